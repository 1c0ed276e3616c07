/** In a clone only: runs the TypeScript file named by `?run=`, in this thread (bin/nibble.js) or as a worker's entry. */
import { register } from "tsx/esm/api";

register();
await import(new URL(import.meta.url).searchParams.get("run"));
