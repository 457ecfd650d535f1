// A real coordinator and real workers for the browser's tests: processes of the program, a tiny base, a job of some hundred steps.

import { spawn } from "node:child_process";
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { createInterface } from "node:readline";

const ROOT = resolve(import.meta.dirname, "../..");
const FIXTURES = join(ROOT, "crates/testkit/fixtures/reference");

/** Waits for a condition, never for a time. */
export async function until(what, check, limitMs = 60_000) {
  const began = Date.now();
  let last;
  while (Date.now() - began < limitMs) {
    try {
      const value = await check();
      if (value) return value;
    } catch (error) {
      last = error;
    }
    await new Promise((done) => setTimeout(done, 25));
  }
  throw new Error(`waited ${limitMs} ms for ${what}${last ? `: ${last.message}` : ""}`);
}

export class Crew {
  #folder = mkdtempSync(join(tmpdir(), "shanty-web-"));
  #program;
  #processes = new Map();
  #workers = 0;
  address = "";
  token = "";
  every = 0;

  constructor(program) {
    this.#program = resolve(program);
    mkdirSync(join(this.#folder, "state"));
    for (const part of ["models/llama", "tokenizer"]) cpSync(join(FIXTURES, part), join(this.#folder, "base"), { recursive: true });
  }

  async start(listen = "127.0.0.1:0") {
    const coordinator = this.#spawn("coordinator", ["coordinator", "--listen", listen, "--state-dir", join(this.#folder, "state"), "--output", "json"]);
    for await (const line of createInterface({ input: coordinator.stdout })) {
      const event = JSON.parse(line);
      if (event.event === "listening") {
        this.address = event.address;
        this.token = readFileSync(event.local_key, "utf8").trim();
        return;
      }
    }
    throw new Error("the coordinator ended before it listened");
  }

  /** An address of the dashboard as `shanty` prints it. */
  link(path) {
    return `${this.address}${path}#token=${this.token}`;
  }

  /** The same address and state again, after a kill. */
  async restart() {
    await this.start(this.address.replace(/^https?:\/\//, ""));
  }

  addWorker() {
    const name = `worker-${++this.#workers}`;
    this.#spawn(name, ["worker", "--coordinator", this.address, "--device", "cpu", "--threads", "1"]);
    return name;
  }

  /** A token of a role, named after whoever has it. */
  async makeToken(role) {
    const answer = await this.run(["token", "create", "--role", role, "--name", `${role}er`, "--coordinator", this.address, "--output", "json"]);
    return JSON.parse(answer).token;
  }

  async submit(settings) {
    this.every = Math.ceil(settings.steps / 10);
    const lines = Array.from({ length: settings.lines }, (_, index) => JSON.stringify({ text: `the crew hauls row ${index}, and row ${index * 7} after it, until the anchor is up` }));
    writeFileSync(join(this.#folder, "train.jsonl"), lines.join("\n"));
    writeFileSync(join(this.#folder, "eval.jsonl"), lines.slice(0, 4).join("\n"));
    const file = join(this.#folder, `${settings.name}.toml`);
    writeFileSync(
      file,
      `name = "${settings.name}"
[base]
model = "base"
[adapter]
r = 4
target_modules = "all-linear"
[data]
train = "train.jsonl"
eval = "eval.jsonl"
max_length = 32
[train]
steps = ${settings.steps}
global_batch_size = ${settings.batch ?? 4}
learning_rate = 5e-3
eval_every_steps = ${Math.ceil(settings.steps / 6)}
[checkpoint]
store = "runs/${settings.name}"
every_steps = ${this.every}
[cluster]
workers = { min = ${settings.min ?? 1}, max = 8 }
device = "cpu"
`,
    );
    const answer = await this.run(["submit", file, "--coordinator", this.address, "--output", "json"]);
    return JSON.parse(answer).job;
  }

  /** Runs a command to its end; its standard output. */
  run(args) {
    return new Promise((done, fail) => {
      const child = spawn(this.#program, args, { stdio: ["ignore", "pipe", "pipe"], cwd: this.#folder });
      let [out, err] = ["", ""];
      child.stdout.on("data", (text) => (out += text));
      child.stderr.on("data", (text) => (err += text));
      child.on("close", (code) => (code === 0 ? done(out) : fail(new Error(`${args[0]} ended with ${code}: ${err}`))));
    });
  }

  async kill(name) {
    const child = this.#processes.get(name);
    this.#processes.delete(name);
    const gone = new Promise((done) => child.once("close", done));
    // The whole group: a worker is a parent and a process a device.
    process.kill(-child.pid, "SIGKILL");
    await gone;
  }

  async stop() {
    for (const name of [...this.#processes.keys()]) await this.kill(name).catch(() => {});
    rmSync(this.#folder, { recursive: true, force: true });
  }

  #spawn(name, args) {
    const child = spawn(this.#program, args, { stdio: ["ignore", "pipe", "ignore"], cwd: this.#folder, detached: true });
    this.#processes.set(name, child);
    return child;
  }
}
