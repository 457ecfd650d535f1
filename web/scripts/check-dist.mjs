// Whether the committed build is what the sources make: builds aside, and compares every file.

import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, relative, resolve } from "node:path";
import { build } from "vite";

const COMMITTED = resolve(import.meta.dirname, "../dist");
const fresh = mkdtempSync(join(tmpdir(), "shanty-dist-"));

/** Every file below a folder, by its path. */
function files(folder) {
  const found = readdirSync(folder, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile());
  return new Map(found.map(({ parentPath, name }) => [relative(folder, join(parentPath, name)), readFileSync(join(parentPath, name))]));
}

await build({ root: resolve(import.meta.dirname, ".."), logLevel: "warn", build: { outDir: fresh, emptyOutDir: true } });
const [before, now] = [files(COMMITTED), files(fresh)];
rmSync(fresh, { recursive: true });
const names = [...new Set([...before.keys(), ...now.keys()])].sort();
const stale = names.filter((name) => !before.get(name)?.equals(now.get(name) ?? Buffer.alloc(0)) || !now.has(name));
if (stale.length > 0) {
  console.error(`web/dist is not what the sources make; run \`npm run build\` in web/. Differs: ${stale.join(", ")}`);
  process.exit(1);
}
console.log(`web/dist is fresh: ${names.length} files`);
