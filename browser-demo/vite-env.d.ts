/** What Vite adds to the language: `import.meta.env`, and imports of styles. */
/// <reference types="vite/client" />
