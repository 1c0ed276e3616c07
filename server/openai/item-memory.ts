/**
 * Output items of earlier answers, by id: clients (the Vercel AI SDK) name them in `input` instead of sending them again.
 * Kept in memory while there is room; the oldest go first.
 */
import { ApiError } from "./errors.ts";

export interface KeptItem {
  readonly id: string;
  readonly type: string;
}

/** Of all items as JSON: some hundred long conversations. */
const MOST_CHARACTERS = 16_000_000;

export class ItemMemory {
  private readonly items = new Map<string, string>(); // as JSON
  private characters = 0;

  keep(items: readonly KeptItem[]): void {
    for (const item of items) {
      const text = JSON.stringify(item);
      this.items.set(item.id, text);
      this.characters += text.length;
    }
    for (const [id, text] of this.items) {
      if (this.characters <= MOST_CHARACTERS) return;
      this.items.delete(id);
      this.characters -= text.length;
    }
  }

  /** `input` with what it refers to in the place of its references; error: 404 for one that is not there. */
  resolve<T extends { readonly type?: string }>(input: string | readonly T[]): string | T[] {
    if (typeof input === "string") return input;
    return input.map((item, index) => {
      if (item.type !== "item_reference") return item;
      const { id } = item as { readonly id?: unknown };
      const kept = this.items.get(String(id));
      if (kept !== undefined) return JSON.parse(kept) as T;
      const message = `Item with id '${String(id).slice(0, 64)}' not found: items are kept while there is room, and none where 'store' is false. Send the item itself.`;
      throw new ApiError(404, "not_found", message, { param: `input[${index}].id`, code: "not_found" });
    });
  }
}
