// A made-up job of 10,000 steps and 256 members that moves twenty times a second: how smoothly the page draws it. This one alone is
// not fed by a real run.

import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { join, resolve } from "node:path";
import { create, toBinary } from "@bufbuild/protobuf";

import { assert } from "./checks.mjs";
import { message } from "./wire.mjs";

const DIST = resolve(import.meta.dirname, "../dist");
const POINTS = 10_000;
const MEMBERS = 256;
const STEP_MS = 50;
const MEASURE_MS = 5_000;
const LEAST_FRAMES = 30;

const TYPES = { html: "text/html", js: "text/javascript", css: "text/css", svg: "image/svg+xml" };

const step = (number) => ({
  step: BigInt(number),
  attempt: 1,
  generation: 1n,
  loss: 4 * Math.exp(-number / 4_000) + 0.2 * Math.sin(number) ** 2 + 1,
  learningRate: 2e-4 * (1 - number / 100_000),
  gradientNorm: 1 + Math.cos(number / 7),
  tokens: 8192n,
  tokensPerSecond: 90_000 + 5_000 * Math.sin(number / 50),
  workers: MEMBERS,
  unixMs: BigInt(Date.now()),
});

const members = (number) =>
  Array.from({ length: MEMBERS }, (_, rank) => ({
    workerId: `node-${rank >> 3}-gpu-${rank & 7}`,
    host: `node-${rank >> 3}`,
    pid: 1000 + rank,
    device: `cuda:${rank & 7}`,
    rank,
    phase: number % 2 === 0 ? 5 : 6,
    step: BigInt(number),
    beatAgeSeconds: ((rank + number) % 25) / 100,
    timings: { dataSeconds: 0.01, computeSeconds: 0.8 + (rank % 13) / 100, reduceSeconds: 0.2 - (rank % 13) / 100, updateSeconds: 0.02, tokens: 32n },
  }));

const crew = { usualStepSeconds: 1, deadlineSeconds: 10, stragglers: [], recoveries: [], spares: [] };
const ledger = { committed: 1_000_000n, leased: 4_000n, remaining: 9_000_000n };
const goodput = { productiveSeconds: 9_000, stalledSeconds: 10, recomputedSeconds: 0, elapsedSeconds: 9_100 };

function frame(name, value, flag = 0) {
  const bytes = toBinary(message(name), create(message(name), value));
  const head = Buffer.alloc(5);
  head[0] = flag;
  head.writeUInt32BE(bytes.length, 1);
  return Buffer.concat([head, bytes]);
}

function end() {
  const trailers = Buffer.from("grpc-status: 0\r\n");
  const head = Buffer.alloc(5);
  head[0] = 0x80;
  head.writeUInt32BE(trailers.length, 1);
  return Buffer.concat([head, trailers]);
}

const status = (number) => ({
  jobId: "made-up",
  state: 4,
  reason: `generation 1 of ${MEMBERS} workers`,
  attempt: 1,
  generation: 1n,
  step: BigInt(number),
  steps: 100_000n,
  epoch: 1.2,
  tokensPerSecond: 90_000,
  etaSeconds: 4_000,
  members: members(number),
  ledger,
  crew,
  goodput,
});

function watch(response) {
  let number = POINTS;
  response.write(frame("WatchJobResponse", { update: { case: "status", value: status(number) } }));
  const timer = setInterval(() => {
    number++;
    response.write(frame("WatchJobResponse", { update: { case: "step", value: step(number) } }));
    if (number % (1000 / STEP_MS) === 0) {
      response.write(frame("WatchJobResponse", { update: { case: "pulse", value: { unixMs: BigInt(Date.now()), members: members(number), ledger, crew, goodput, tokensPerSecond: 90_000 } } }));
    }
  }, STEP_MS);
  response.on("close", () => clearInterval(timer));
}

const UNARY = {
  "/shanty.v1.AccessService/WhoAmI": () => frame("WhoAmIResponse", { name: "anyone", role: 4, calls: ["/shanty.v1.JobService/DrainWorker"] }),
  "/shanty.v1.StatusService/ListSteps": () => frame("ListStepsResponse", { oneOf: 1n, steps: Array.from({ length: POINTS }, (_, at) => step(at + 1)) }),
  "/shanty.v1.StatusService/ListEvents": () => frame("ListEventsResponse", {}),
  "/shanty.v1.StatusService/GetConfiguration": () => frame("GetConfigurationResponse", { specJson: "{}" }),
  "/shanty.v1.StatusService/TailLogs": () => frame("TailLogsResponse", {}),
};

function serve(request, response) {
  const path = new URL(request.url, "http://localhost").pathname;
  if (request.method === "POST") {
    response.writeHead(200, { "content-type": "application/grpc-web+proto" });
    if (path === "/shanty.v1.StatusService/WatchJob") return watch(response);
    return response.end(Buffer.concat([UNARY[path](), end()]));
  }
  const file = path === "/icon.svg" || path.startsWith("/assets/") ? path : "/index.html";
  response.writeHead(200, { "content-type": TYPES[file.split(".").pop()] });
  response.end(readFileSync(join(DIST, file)));
}

export async function smooth(checks) {
  const server = createServer(serve);
  await new Promise((done) => server.listen(0, "127.0.0.1", done));
  try {
    const page = await checks.open(`http://127.0.0.1:${server.address().port}/jobs/made-up`);
    await page.getByRole("row", { name: /node-31-gpu-7/ }).waitFor();
    await page.getByRole("img", { name: new RegExp(`train: 1\\d{4} values`) }).waitFor();
    await checks.picture(page, "crowd");
    const frames = await page.evaluate(
      (measure) =>
        new Promise((done) => {
          const [began, gaps] = [performance.now(), []];
          let last = began;
          const tick = (now) => {
            gaps.push(now - last);
            last = now;
            if (now - began < measure) requestAnimationFrame(tick);
            else done({ rate: (gaps.length * 1000) / (now - began), longest: Math.max(...gaps) });
          };
          requestAnimationFrame(tick);
        }),
      MEASURE_MS,
    );
    const label = await page.getByRole("img", { name: /^Loss/ }).getAttribute("aria-label");
    const values = Number(/train: (\d+) values/.exec(label)[1]);
    assert(values > POINTS + MEASURE_MS / STEP_MS / 2, `the chart has ${values} points: it stood still`);
    assert(frames.rate >= LEAST_FRAMES, `${frames.rate.toFixed(1)} frames a second`);
    return `${frames.rate.toFixed(1)} frames a second, the longest of ${frames.longest.toFixed(0)} ms`;
  } finally {
    server.closeAllConnections();
    server.close();
  }
}
