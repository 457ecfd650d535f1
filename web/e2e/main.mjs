// The dashboard in a real browser against a real crew: npm run e2e [-- --pictures FOLDER]
//
// SHANTY names the program (else the debug build), CHROMIUM the browser (else one on the path). Where there is no browser the checks
// are skipped aloud; with SHANTY_REQUIRE_CHROMIUM=1 that is a failure. Prints one line a check; ends with 0 when every check holds.

import { accessSync, constants } from "node:fs";
import { delimiter, join, resolve } from "node:path";
import { parseArgs } from "node:util";

import { Checks } from "./checks.mjs";
import { dashboard } from "./dashboard.mjs";
import { doors } from "./doors.mjs";
import { smooth } from "./synthetic.mjs";

const { values } = parseArgs({ options: { pictures: { type: "string" } } });

function runs(path) {
  try {
    accessSync(path, constants.X_OK);
    return true;
  } catch {
    return false;
  }
}

function browser() {
  const folders = (process.env.PATH ?? "").split(delimiter);
  const known = ["chromium", "chromium-browser", "google-chrome"].flatMap((name) => folders.map((folder) => join(folder, name)));
  return [process.env.CHROMIUM, ...known].find((path) => path && runs(path));
}

const chromium = browser();
if (!chromium) {
  console.log("SKIPPED: no Chromium on the path; the dashboard was not looked at");
  process.exit(process.env.SHANTY_REQUIRE_CHROMIUM === "1" ? 1 : 0);
}
const target = process.env.CARGO_TARGET_DIR ?? resolve(import.meta.dirname, "../../target");
const program = process.env.SHANTY ?? join(target, "debug/shanty");
if (!runs(program)) {
  console.error(`there is no program at ${program}: cargo build, or set SHANTY`);
  process.exit(2);
}

const checks = await Checks.start(chromium, values.pictures && resolve(values.pictures));
try {
  await dashboard(checks, program);
  await doors(checks, program);
  await checks.check("10,000 points and 256 members are drawn at 30 frames a second or more", () => smooth(checks));
  await checks.check("no page complained and none asked another origin", () => {
    if (checks.complaints.length > 0) throw new Error([...new Set(checks.complaints)].join("; "));
  });
} finally {
  await checks.stop();
}
console.log(checks.failures === 0 ? "all checks hold" : `${checks.failures} checks failed`);
process.exit(checks.failures === 0 ? 0 : 1);
