#!/usr/bin/env node
/**
 * Adds to package-lock.json the optional packages of other platforms that a registry did not have when the lock was
 * written (npm leaves them out silently, and then `npm ci` refuses the lock). Exact versions only; run after `npm install`.
 */
import { readFileSync, writeFileSync } from "node:fs";

const path = new URL("../package-lock.json", import.meta.url);
const lock = JSON.parse(readFileSync(path, "utf8"));

/** Whether Node would find `name` from the package at `from`: in its own node_modules, or in one further up. */
function isFound(from, name) {
  const parts = from.split(/\/?node_modules\//).slice(1); // "node_modules/a/node_modules/b" -> a, b; "" -> none
  return [...parts.keys(), parts.length].some((depth) => {
    const folders = [...parts.slice(0, depth), name].map((part) => `node_modules/${part}`);
    return folders.join("/") in lock.packages;
  });
}

const systems = {
  android: "android",
  darwin: "darwin",
  freebsd: "freebsd",
  netbsd: "netbsd",
  openbsd: "openbsd",
  linux: "linux",
  linuxmusl: "linux",
  win32: "win32",
  sunos: "sunos",
  aix: "aix",
  openharmony: "openharmony",
  ohos: "openharmony",
  wasm32: "none",
  wasi: "none",
};
const processors = ["arm64", "arm", "ia32", "x64", "loong64", "mips64el", "ppc64", "riscv64", "s390x", "wasm32"];

function platformOf(name) {
  const words = name.split(/[-/@.]/);
  const os = words.map((word) => systems[word]).find(Boolean);
  const cpu = words.map((word) => processors.find((known) => word === known)).find(Boolean);
  return {
    ...(cpu && { cpu: [cpu] }),
    ...(/musl/.test(name) ? { libc: ["musl"] } : /gnu/.test(name) ? { libc: ["glibc"] } : {}),
    optional: true,
    ...(os && os !== "none" && { os: [os] }),
  };
}

let added = 0;
for (const [place, entry] of Object.entries(lock.packages)) {
  for (const [name, version] of Object.entries(entry.optionalDependencies ?? {})) {
    if (isFound(place, name)) continue;
    if (!/^\d/.test(version)) throw new Error(`${place}: ${name}@${version} is no exact version`);
    const { dev } = entry;
    lock.packages[`node_modules/${name}`] = { version, ...(dev && { dev }), ...platformOf(name) };
    added++;
  }
}
lock.packages = Object.fromEntries(Object.entries(lock.packages).sort(([a], [b]) => a.localeCompare(b, "en")));
writeFileSync(path, `${JSON.stringify(lock, null, 2)}\n`);
console.log(`${added} packages of other platforms added to package-lock.json`);
