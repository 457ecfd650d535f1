// A job from its submission to its end, as a browser shows it; faults on the way.

import { Crew, until } from "./crew.mjs";
import { assert, spread } from "./checks.mjs";
import { client } from "./wire.mjs";

/** What a browser itself logs of requests that a coordinator that is away does not answer. */
const AWAY = /net::ERR_|Failed to load resource/;
/** Steps may come faster than the page shows figures: some are seen. */
const STEPS_WATCHED = 200;
const LEAST_SEEN = 30;
const LATEST_POINT_MS = 500;
const LATEST_RECOVERY_MS = 2_000;

const stepOf = async (page) => Number((await page.getByTestId("step").textContent()).replaceAll(/\D/g, ""));
const wordOf = (page) => page.locator("h1 + .badge").textContent();
const steps = (page, more = 3) => async (from) => until("a later step", async () => (await stepOf(page)) > from + more);

export async function dashboard(checks, program) {
  const crew = new Crew(program);
  const { check } = { check: checks.check.bind(checks) };
  try {
    await crew.start();
    for (let worker = 0; worker < 3; worker++) crew.addWorker();
    const open = (path, options) => checks.open(crew.link(path), options);
    let job, page;

    await check("a link with the key signs in, and the key leaves the address at once", async () => {
      page = await open("/");
      await page.getByText("No job yet").waitFor();
      await page.getByText(/may do everything/).waitFor();
      assert(page.url() === `${crew.address}/`, `the address is ${page.url()}`);
      const kept = await page.evaluate(() => [sessionStorage.length, Object.values(localStorage).filter((value) => value.startsWith("shanty-"))]);
      assert(kept[0] === 1 && kept[1].length === 0, "the token is kept in the session alone");
      await checks.audit(page, "empty list");
      await checks.picture(page, "empty");
    });

    const begun = await check("a job that is submitted shows its first step", async () => {
      const began = performance.now();
      job = await crew.submit({ name: "browser", lines: 4_000, steps: 6_000, batch: 48, min: 2 });
      await page.getByRole("link", { name: job }).click();
      await until("the first step on the page", async () => (await stepOf(page)) > 0);
      return `${Math.round(performance.now() - began)} ms after submission`;
    });
    // All else is about that job.
    if (!begun) return;

    await check("the curves move while the job runs", async () => {
      const chart = page.getByRole("img", { name: /^Loss/ });
      const [before, step] = [await chart.getAttribute("aria-label"), await stepOf(page)];
      await steps(page)(step);
      assert((await chart.getAttribute("aria-label")) !== before, "the chart stands still");
      const drawn = await chart.locator("canvas").first().evaluate((canvas) => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return data.some((value) => value !== 0);
      });
      assert(drawn, "nothing is drawn");
    });

    await check(`a point is on the page within ${LATEST_POINT_MS} ms of its step`, async () => {
      // The moment at which each step is shown, by the page's clock, which is the coordinator's machine's.
      await page.evaluate(() => {
        const step = document.querySelector('[data-testid="step"]');
        globalThis.seen = {};
        const note = () => (globalThis.seen[step.textContent.replaceAll(/\D/g, "")] ??= Date.now());
        new MutationObserver(note).observe(step, { characterData: true, childList: true, subtree: true });
      });
      const from = await stepOf(page);
      await steps(page, STEPS_WATCHED)(from);
      const seen = await page.evaluate(() => globalThis.seen);
      const { steps: records } = await client("StatusService", crew.address, crew.token).listSteps({ jobId: job, fromStep: BigInt(from), limit: 100_000 });
      const late = records.filter(({ step }) => seen[step] !== undefined).map(({ step, unixMs }) => seen[step] - Number(unixMs));
      assert(late.length >= LEAST_SEEN, `${late.length} of ${STEPS_WATCHED} steps were seen`);
      const { median, p99, most } = spread(late);
      assert(median <= LATEST_POINT_MS, `median ${median} ms`);
      return `median ${median} ms, 99 of 100 within ${p99} ms, at most ${most} ms, over ${late.length} steps`;
    });

    await check("a chart is read and zoomed by pointer and by keys", async () => {
      const chart = page.getByRole("img", { name: /^Loss/ });
      await chart.scrollIntoViewIfNeeded();
      const box = await chart.locator(".u-over").boundingBox();
      await page.mouse.move(box.x + box.width * 0.5, box.y + box.height / 2);
      const legend = chart.locator(".u-legend .u-value").first();
      await until("the value under the pointer", async () => /\d/.test(await legend.textContent()));
      await page.mouse.move(box.x + box.width * 0.3, box.y + 40);
      await page.mouse.down();
      await page.mouse.move(box.x + box.width * 0.6, box.y + 60, { steps: 5 });
      await page.mouse.up();
      const all = page.getByRole("button", { name: "Show all steps" });
      await all.waitFor();
      await checks.picture(page, "zoomed");
      await chart.focus();
      await page.keyboard.press("Escape");
      await all.waitFor({ state: "detached" });
      await page.keyboard.press("ArrowRight");
      await page.keyboard.press("+");
      await all.waitFor();
      const said = await page.locator("figure", { has: chart }).locator("[aria-live]").textContent();
      assert(/step \d+: train/.test(said), `what is said of a point: ${said}`);
      await page.keyboard.press("0");
      await all.waitFor({ state: "detached" });
    });

    await check("a checkpoint that is asked for is written", async () => {
      const table = page.getByRole("region", { name: "Checkpoints, table" });
      const known = async () => ((await table.count()) > 0 ? await table.locator("tbody tr").count() : 0);
      const asked = client("StatusService", crew.address, crew.token);
      await page.getByRole("button", { name: "Checkpoint now…" }).click();
      await page.getByRole("button", { name: "Write it" }).click();
      const said = await page.getByText(/^Asked for, beyond step/).textContent();
      const after = BigInt(/\d+/.exec(said)[0]);
      const written = await until("the checkpoint", async () => {
        const { status } = await asked.getStatus({ jobId: job });
        return status.checkpoints.find(({ step }) => step > after && step % BigInt(crew.every) !== 0n);
      });
      await until("it in the table", async () => (await known()) > 0 && (await table.textContent()).includes(written.path));
      await page.getByRole("button", { name: "Look into the store" }).click();
      await table.getByText("whole manifest").first().waitFor();
      return `step ${written.step}, asked for after step ${after}`;
    });

    await check(`a worker that is killed appears as a recovery within ${LATEST_RECOVERY_MS} ms`, async () => {
      const table = page.getByRole("region", { name: "Recoveries, table" });
      const rows = async () => ((await table.count()) > 0 ? table.locator("tbody tr").count() : 0);
      const before = await rows();
      const began = performance.now();
      await crew.kill("worker-3");
      await until("a row", async () => (await rows()) > before, 10_000);
      const waited = Math.round(performance.now() - began);
      await until("its figures", async () => /lost/.test(await table.locator("tbody tr").first().textContent()) && (await table.getByText("goes on").count()) === 0);
      await checks.picture(page, "recovery");
      assert(waited <= LATEST_RECOVERY_MS, `it took ${waited} ms`);
      return `${waited} ms`;
    });

    await check("another worker joins, and one that is drained leaves", async () => {
      crew.addWorker();
      const present = page.getByTestId("present");
      await until("three at work", async () => (await present.textContent()).startsWith("3 at work"));
      const drain = page.getByRole("button", { name: /^Drain… / }).last();
      await drain.click();
      await page.getByRole("button", { name: "Drain it" }).click();
      await until("two at work", async () => (await present.textContent()).startsWith("2 at work"));
    });

    await check("the page recovers when the coordinator is killed and comes back", async () => {
      const before = checks.complaints.length;
      const step = await stepOf(page);
      await crew.kill("coordinator");
      await page.getByText(/Connection lost/).first().waitFor({ timeout: 10_000 });
      await checks.picture(page, "lost");
      await crew.restart();
      const began = performance.now();
      await page.getByText(/Connection lost/).first().waitFor({ state: "detached", timeout: 20_000 });
      await until("a later step", async () => (await stepOf(page)) > step, 60_000);
      checks.complaints.splice(before, Infinity, ...checks.complaints.slice(before).filter((text) => !AWAY.test(text)));
      return `a later step ${Math.round(performance.now() - began)} ms after it listened again`;
    });

    await check("logs come, and the coordinator filters them", async () => {
      const log = page.getByRole("log");
      await until("a line", async () => (await log.locator(".line").count()) > 0);
      await page.getByLabel("Text").fill("surely no line says this");
      await log.getByText("No line matches").waitFor();
      await page.getByLabel("Text").fill("STEP APPLIED");
      await until("only such lines", async () => {
        const lines = await log.locator(".line").allTextContents();
        return lines.length > 0 && lines.every((line) => line.includes("step applied"));
      });
      await page.getByLabel("Level").selectOption("error");
      await log.getByText("No line matches").waitFor();
      await page.getByLabel("Level").selectOption("info");
      await page.getByLabel("Text").fill("");
    });

    await check("the configuration is the job file as it was submitted", async () => {
      const table = page.getByRole("region", { name: "Job file" });
      await table.getByText("train.global_batch_size").waitFor();
      const text = await table.textContent();
      assert(text.includes("train.learning_rate") && text.includes("0.005") && text.includes("adapter.method"), text);
      await page.getByText("Modules", { exact: true }).waitFor();
    });

    await check("a second job waits in the queue", async () => {
      const second = await crew.submit({ name: "second", lines: 200, steps: 30, min: 2 });
      const queue = await open("/queue");
      await queue.getByRole("region", { name: "Jobs that wait, table" }).getByRole("link", { name: second }).waitFor();
      await queue.getByRole("region", { name: "Jobs at work, table" }).getByRole("link", { name: job }).waitFor();
      await checks.audit(queue, "queue");
      await checks.picture(queue, "queue");
    });

    for (const [scheme, width] of [["light", 1280], ["dark", 1280], ["light", 375], ["dark", 375]]) {
      await check(`axe finds nothing serious, ${scheme}, ${width} pixels wide, and nothing scrolls sideways`, async () => {
        const phone = width < 500;
        const options = { colorScheme: scheme, viewport: { width, height: phone ? 812 : 900 }, ...(phone ? { isMobile: true, hasTouch: true } : {}) };
        for (const [name, path, ready] of [
          ["list", "/", (at) => at.getByRole("link", { name: job }).waitFor()],
          ["queue", "/queue", (at) => at.getByRole("link", { name: job }).waitFor()],
          ["job", `/jobs/${job}`, (at) => at.getByRole("region", { name: "Job file" }).waitFor()],
          ["compare", `/compare?job=${job}&job=second`, (at) => at.getByRole("link", { name: "second" }).waitFor()],
          ["missing", "/jobs/a/b", (at) => at.getByText("No such page").waitFor()],
        ]) {
          const at = await open(path, options);
          await ready(at);
          await checks.picture(at, `${name}-${scheme}-${width}`);
          await checks.audit(at, name);
          const beyond = await at.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
          assert(beyond <= 0, `${name} is ${beyond} pixels too wide`);
          await at.context().close();
        }
      });
    }

    await check("keys alone reach a job and cancel it", async () => {
      const list = await open("/");
      await list.getByRole("link", { name: job }).waitFor();
      await tabTo(list, (focused) => focused === job);
      await list.keyboard.press("Enter");
      await list.getByTestId("step").waitFor();
      await tabTo(list, (focused) => focused === "Cancel job…");
      await list.keyboard.press("Enter");
      await list.getByRole("dialog").waitFor();
      await list.keyboard.press("Escape");
      await list.getByRole("dialog").waitFor({ state: "detached" });
      await list.keyboard.press("Enter");
      await tabTo(list, (focused) => focused === "Stop it");
      await list.keyboard.press("Enter");
      await until("the word", async () => (await wordOf(list)) === "cancelled");
    });

    await check("two runs side by side, one of them to its end", async () => {
      const compare = await open(`/compare?job=${job}&job=second`);
      await compare.getByRole("row", { name: /second.*succeeded/ }).waitFor({ timeout: 90_000 });
      await compare.getByRole("img", { name: /Training loss.*second: \d+ values/ }).waitFor();
      await checks.picture(compare, "compare");
      await checks.audit(compare, "comparison of ended runs");
    });

    await check("an address that is none, and a job that is none, say so", async () => {
      const before = checks.complaints.length;
      const missing = await open("/jobs/none-such");
      await missing.getByText(/there is no job `none-such`/).first().waitFor();
      checks.complaints.splice(before, Infinity, ...checks.complaints.slice(before).filter((text) => !AWAY.test(text)));
    });
  } finally {
    await checks.close();
    await crew.stop();
  }
}

/** Presses Tab until what has the focus is wanted, by its text. */
async function tabTo(page, wanted) {
  for (let presses = 0; presses < 60; presses++) {
    await page.keyboard.press("Tab");
    if (wanted(await page.evaluate(() => document.activeElement?.textContent ?? ""))) return;
  }
  throw new Error("sixty presses of Tab do not lead there");
}
