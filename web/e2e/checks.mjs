// What the checks share: a browser, pages that remember what went wrong in them, and one line a check.

import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { chromium } from "playwright-core";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

/** How long something may take to be on a page. */
const WAIT_MS = 15_000;

export class Checks {
  complaints = [];
  failures = 0;
  #browser;
  #pictures;

  static async start(executablePath, pictures) {
    const checks = new Checks();
    // Headless, without a sandbox: continuous integration runs as root.
    checks.#browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
    checks.#pictures = pictures;
    if (pictures) mkdirSync(pictures, { recursive: true });
    return checks;
  }

  async stop() {
    await this.#browser.close();
  }

  /** Closes all pages: what they asked is over before the coordinator is. */
  async close() {
    for (const context of this.#browser.contexts()) await context.close();
  }

  /** Makes a check; says whether it holds. */
  async check(name, act) {
    const began = performance.now();
    try {
      const said = await act();
      console.log(`ok    ${name}${said ? `: ${said}` : ""} (${Math.round(performance.now() - began)} ms)`);
      return true;
    } catch (error) {
      this.failures++;
      console.log(`FAIL  ${name}: ${error.message}`);
      return false;
    }
  }

  /** A page of its own browser profile. Whatever it complains about, and any request to another origin, is remembered. */
  async open(url, options = {}) {
    const { origin } = new URL(url);
    const context = await this.#browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
    context.setDefaultTimeout(WAIT_MS);
    const page = await context.newPage();
    page.on("crash", () => this.complaints.push(`the page at ${url} crashed`));
    page.on("console", (message) => message.type() === "error" && this.complaints.push(message.text()));
    page.on("pageerror", (error) => this.complaints.push(error.message));
    page.on("request", (request) => {
      if (new URL(request.url()).origin !== origin) this.complaints.push(`a request to ${request.url()}`);
    });
    await page.goto(url);
    return page;
  }

  /** Fails if axe finds something serious. It comes in by the debugger's way, which no policy of the page forbids. */
  async audit(page, what) {
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => globalThis.axe.run(document));
    const serious = violations.filter(({ impact }) => impact === "serious" || impact === "critical");
    const words = serious.map(({ id, nodes }) => `${id} at ${nodes.map(({ target, failureSummary }) => `${target} (${failureSummary})`).slice(0, 3).join(", ")}`);
    assert(serious.length === 0, `${what}: ${words.join("; ")}`);
  }

  async picture(page, name) {
    if (this.#pictures) await page.screenshot({ path: join(this.#pictures, `${name}.png`), fullPage: true });
  }
}

export function assert(holds, text) {
  if (!holds) throw new Error(text);
}

/** The middle one, the one that 99 of 100 are below, and the greatest. */
export function spread(values) {
  const sorted = values.toSorted((one, other) => one - other);
  const at = (share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  return { median: at(0.5), p99: at(0.99), most: sorted[sorted.length - 1] };
}
