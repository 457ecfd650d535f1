// The dashboard in a real browser against a real run: node e2e/dashboard.mjs PROGRAM [PICTURES]
//
// Needs Chromium (CHROMIUM names it, else `chromium` on the path). Ends with 0 when every check holds; prints one line a check.

import { readFileSync, mkdirSync } from "node:fs";
import { join } from "node:path";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

import { Crew, until } from "./crew.mjs";

const [program, pictures] = process.argv.slice(2);
if (!program) {
  console.error("usage: node e2e/dashboard.mjs PROGRAM [PICTURES]");
  process.exit(2);
}
if (pictures) mkdirSync(pictures, { recursive: true });

const axeSource = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const crew = new Crew(program);
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"] });
const complaints = [];
let failures = 0;

async function check(name, act) {
  const began = performance.now();
  try {
    const said = await act();
    console.log(`ok    ${name}${said ? `: ${said}` : ""} (${Math.round(performance.now() - began)} ms)`);
  } catch (error) {
    failures++;
    console.log(`FAIL  ${name}: ${error.message}`);
  }
}

function assert(holds, text) {
  if (!holds) throw new Error(text);
}

/** A page that remembers what went wrong in it. Requests that fail while the coordinator is away are expected. */
async function open(path, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
  const page = await context.newPage();
  page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(error.message));
  page.on("request", (request) => {
    if (!request.url().startsWith(crew.address)) complaints.push(`a request to ${request.url()}`);
  });
  if (crew.localKey) {
    const token = readFileSync(crew.localKey, "utf8").trim();
    await page.addInitScript((value) => sessionStorage.setItem("shanty-token", value), token);
  }
  await page.goto(crew.address + path);
  return page;
}

async function audit(page, what) {
  await page.evaluate(axeSource);
  const { violations } = await page.evaluate(() => globalThis.axe.run(document));
  const serious = violations.filter(({ impact }) => impact === "serious" || impact === "critical");
  assert(serious.length === 0, `${what}: ${serious.map(({ id, nodes }) => `${id} at ${nodes[0].target}`).join("; ")}`);
}

const picture = async (page, name) => pictures && page.screenshot({ path: join(pictures, `${name}.png`), fullPage: true });
const stepOf = async (page) => Number((await page.getByTestId("step").textContent()).replaceAll(/\D/g, ""));

try {
  await crew.start();
  for (let worker = 0; worker < 2; worker++) crew.addWorker();
  let job, page;

  await check("the list shows a job that was submitted", async () => {
    const list = await open("/");
    await list.getByText("No job yet").waitFor();
    await picture(list, "empty");
    const began = performance.now();
    job = await crew.submit({ name: "browser", lines: 2_000, steps: 2_000, min: 2 });
    await list.getByRole("link", { name: job }).click();
    page = list;
    await until("the first step on the page", async () => (await stepOf(page)) > 0);
    return `first step seen ${Math.round(performance.now() - began)} ms after submission`;
  });

  await check("the curves move while the job runs", async () => {
    const chart = page.getByRole("img", { name: /^Loss/ });
    const [before, step] = [await chart.getAttribute("aria-label"), await stepOf(page)];
    await until("a later step", async () => (await stepOf(page)) > step + 3);
    assert((await chart.getAttribute("aria-label")) !== before, "the chart stands still");
    const pixels = await chart.locator("canvas").first().evaluate((canvas) => {
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return data.some((value) => value !== 0);
    });
    assert(pixels, "nothing is drawn");
    await picture(page, "job");
  });

  await check("a worker that is killed appears as a recovery within two seconds", async () => {
    const table = page.getByRole("region", { name: "Recoveries" });
    const began = performance.now();
    await crew.kill("worker-2");
    await table.waitFor({ timeout: 10_000 });
    const waited = Math.round(performance.now() - began);
    await picture(page, "recovery");
    assert(waited <= 2_000, `it took ${waited} ms`);
    return `${waited} ms`;
  });

  await check("the job goes on with another worker", async () => {
    crew.addWorker();
    const step = await stepOf(page);
    await until("a later step", async () => (await stepOf(page)) > step + 3);
  });

  await check("the page recovers when the coordinator is killed and comes back", async () => {
    const before = complaints.length;
    const step = await stepOf(page);
    await crew.kill("coordinator");
    await page.getByText(/Connection lost/).waitFor({ timeout: 10_000 });
    await picture(page, "lost");
    await crew.start(crew.address.replace(/^https?:\/\//, ""));
    await page.getByText(/Connection lost/).waitFor({ state: "detached", timeout: 20_000 });
    await until("a later step", async () => (await stepOf(page)) > step, 30_000);
    // The browser itself logs every request that a coordinator that is away does not answer.
    complaints.splice(before, complaints.length, ...complaints.slice(before).filter((text) => !/ERR_CONNECTION|ERR_EMPTY_RESPONSE|ERR_INCOMPLETE|Failed to load resource|net::/.test(text)));
  });

  await check("logs come and can be filtered", async () => {
    const log = page.getByRole("log");
    await until("a line", async () => (await log.locator(".line").count()) > 0);
    await page.getByLabel("Text").fill("surely no line says this");
    await log.getByText("No line matches").waitFor();
    await page.getByLabel("Text").fill("");
  });

  await check("nothing serious for axe, light and dark, wide and narrow", async () => {
    await audit(page, "job, light");
    await page.getByRole("button", { name: /Colours/ }).click();
    await page.waitForTimeout(300);
    await audit(page, "job, dark");
    await picture(page, "job-dark");
    const list = await open("/");
    await list.getByRole("link", { name: job }).waitFor();
    await audit(list, "list");
    await picture(list, "list");
    const phone = await open(`/jobs/${job}`, { viewport: { width: 390, height: 844 }, isMobile: true, hasTouch: true });
    await phone.getByTestId("step").waitFor();
    await audit(phone, "job on a phone");
    const wide = await phone.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    assert(wide <= 0, `a phone would scroll sideways by ${wide} pixels`);
    await picture(phone, "phone");
  });

  await check("keys alone reach a job and its actions", async () => {
    const list = await open("/");
    const link = list.getByRole("link", { name: job });
    await link.waitFor();
    await link.focus();
    await list.keyboard.press("Enter");
    await list.getByTestId("step").waitFor();
    const cancel = list.getByRole("button", { name: "Cancel job…" });
    await cancel.focus();
    await list.keyboard.press("Enter");
    await list.getByRole("button", { name: "Stop it" }).focus();
    await list.keyboard.press("Enter");
    await until("the word", async () => (await list.locator("h1 + .badge").textContent()) === "cancelled");
  });

  await check("two runs side by side", async () => {
    const other = await crew.submit({ name: "other", lines: 200, steps: 30 });
    const compare = await open(`/compare?job=${job}&job=${other}`);
    await compare.getByRole("row", { name: new RegExp(`${other}.*succeeded`) }).waitFor({ timeout: 60_000 });
    await picture(compare, "compare");
  });

  await check("an address that is none says so", async () => {
    const missing = await open("/jobs/none-such");
    await missing.getByText(/none-such/).first().waitFor();
  });

  await check("no error in the console and no request elsewhere", () => {
    const real = complaints.filter((text) => !/404|none-such/.test(text));
    assert(real.length === 0, real.join("; "));
  });
} finally {
  await browser.close();
  await crew.stop();
}
process.exit(failures === 0 ? 0 : 1);
