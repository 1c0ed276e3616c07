/** Conversations, kept in IndexedDB of this browser and nowhere else. */

export interface MessageStats {
  readonly tokensPerSecond: number;
  readonly firstTokenMs: number;
  readonly promptTokens: number;
  readonly completionTokens: number;
  /** Model and device that answered. */
  readonly by: string;
}

export interface Message {
  readonly role: "user" | "assistant";
  content: string;
  stats?: MessageStats;
  /** What went wrong, where something did. */
  error?: string;
}

export interface Conversation {
  readonly id: string;
  title: string;
  readonly createdAt: number;
  updatedAt: number;
  messages: Message[];
}

const STORE = "conversations";

function open(): Promise<IDBDatabase> {
  const request = indexedDB.open("nibble", 1);
  request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
  return finished(request);
}

function finished<T>(request: IDBRequest<T>): Promise<T> {
  return new Promise((done, fail) => {
    request.onsuccess = () => done(request.result);
    request.onerror = () => fail(request.error);
  });
}

let database: Promise<IDBDatabase> | undefined;

async function store(mode: IDBTransactionMode): Promise<IDBObjectStore> {
  database ??= open();
  return (await database).transaction(STORE, mode).objectStore(STORE);
}

/** Newest first. */
export async function listConversations(): Promise<Conversation[]> {
  const all = await finished((await store("readonly")).getAll() as IDBRequest<Conversation[]>);
  return all.sort((a, b) => b.updatedAt - a.updatedAt);
}

export async function saveConversation(conversation: Conversation): Promise<void> {
  await finished((await store("readwrite")).put(structuredClone(conversation)));
}

export async function deleteConversation(id: string): Promise<void> {
  await finished((await store("readwrite")).delete(id));
}

const OPEN = "nibble-conversation";

/** Which conversation this tab shows: kept with the tab, so one that is restored after sleep shows it again. */
export const openInTab = {
  get(): string | undefined {
    try {
      return sessionStorage.getItem(OPEN) ?? undefined;
    } catch {
      return undefined; // storage is off
    }
  },
  set(id: string): void {
    try {
      sessionStorage.setItem(OPEN, id);
    } catch {
      // storage is off: a restored tab shows a new conversation
    }
  },
};

export function newConversation(): Conversation {
  const now = Date.now();
  return { id: crypto.randomUUID(), title: "New chat", createdAt: now, updatedAt: now, messages: [] };
}
