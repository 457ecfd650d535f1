// One job as its page shows it: the past from the coordinator's store, then every update as it comes.
//
// Steps may come by the hundred a second. What comes is taken at once and shown at a pace that leaves the browser time for people.
// What moves with every step, with every pulse and with every change of state are signals of their own: a crew of hundreds is not
// drawn anew because a loss came in.

import { batch, signal } from "@preact/signals";

import { statuses } from "../api/clients";
import { follow, wait, type Following } from "../api/stream";
import { Series } from "../chart/series";
import { Pace } from "./pace";
import { JobState } from "../gen/shanty/v1/common_pb";
import type { Checkpoint } from "../gen/shanty/v1/job_pb";
import type { CrewHealth, Event, Goodput, JobStatus, Ledger, Member, Pulse, StepRecord, WatchJobResponse } from "../gen/shanty/v1/status_pb";

/** Steps that are asked for when a page opens or is zoomed, evenly spaced; live ones come one by one. */
const PAST_STEPS = 10_000;
/** Points of a curve that a page keeps; beyond, every other of the older half is dropped. */
const MOST_POINTS = 40_000;
/** Events that a page keeps. */
const MOST_EVENTS = 1_000;
/** How often members, rows and ages are looked at between changes of state. */
const PULSE_MS = 1_000;
/** How long to wait before steps that were missed are asked for: more may be missed meanwhile. */
const CATCH_UP_MS = 1_000;

export const CURVES = ["loss", "learningRate", "gradientNorm", "tokensPerSecond"] as const;
export type Curve = (typeof CURVES)[number];

/** What moves with every step. */
export interface Figures {
  step: bigint;
  steps: bigint;
  epoch: number;
  loss: number | undefined;
  learningRate: number | undefined;
  gradientNorm: number | undefined;
  tokensPerSecond: number;
  etaSeconds: number | undefined;
}

/** Steps from the first to the last of these are shown. */
export type Range = readonly [number, number];

export const isFinal = (state: JobState): boolean => state === JobState.SUCCEEDED || state === JobState.FAILED || state === JobState.CANCELLED;

/** A job that is being looked at. */
export class JobModel {
  readonly status = signal<JobStatus | null>(null);
  readonly figures = signal<Figures | null>(null);
  readonly members = signal<readonly Member[]>([]);
  readonly ledger = signal<Ledger | null>(null);
  readonly crew = signal<CrewHealth | null>(null);
  readonly goodput = signal<Goodput | null>(null);
  readonly checkpoints = signal<readonly Checkpoint[]>([]);
  readonly events = signal<readonly Event[]>([]);
  readonly training = new Series(CURVES);
  readonly evaluation = new Series(["loss"] as const);
  /** More detail of what is zoomed into, where the whole is shown in less. */
  readonly detail = new Series(CURVES);
  readonly range = signal<Range | null>(null);
  /** Of so many steps one is drawn. */
  readonly oneOf = signal(1);
  /** Counts changes of the curves: they grow in place. */
  readonly drawn = signal(0);
  readonly #following: Following;
  readonly #stopping = new AbortController();
  readonly #pace = new Pace(() => this.#show());
  /** What came since it was last shown. */
  #newest: StepRecord | null = null;
  #news: Event[] = [];
  #catchingUp = false;
  #zoomed = new AbortController();

  constructor(readonly id: string) {
    this.#following = follow(
      (stop) => this.#messages(stop),
      (message) => this.#take(message),
      () => isFinal(this.status.peek()?.state ?? JobState.UNSPECIFIED),
    );
  }

  get connection() {
    return this.#following.connection;
  }

  stop(): void {
    this.#following.stop();
    this.#stopping.abort();
    this.#zoomed.abort();
    this.#pace.stop();
  }

  /** The curves as they are to be drawn: in more detail where somebody looks closer. */
  shown(): Series<Curve> {
    return this.range.peek() && this.detail.length > 0 ? this.detail : this.training;
  }

  /** Shows some steps, in as much detail as the coordinator has; all of them for null. */
  zoom(range: Range | null): void {
    this.range.value = range;
    this.#zoomed.abort();
    this.detail.clear();
    this.#pace.ask();
    if (range && this.oneOf.peek() > 1) {
      this.#zoomed = new AbortController();
      void this.#fetchDetail(range, this.#zoomed.signal);
    }
  }

  async #fetchDetail([from, to]: Range, signal: AbortSignal): Promise<void> {
    try {
      const [fromStep, toStep] = [BigInt(Math.max(0, Math.floor(from))), BigInt(Math.max(0, Math.ceil(to)))];
      const answer = await statuses.listSteps({ jobId: this.id, fromStep, toStep, limit: PAST_STEPS }, { signal });
      if (signal.aborted || answer.steps.length < 2) return;
      this.detail.clear();
      for (const step of answer.steps) this.detail.add(Number(step.step), valuesOf(step));
      this.#pace.ask();
    } catch {
      // The coarse curve stays; the banner says that the coordinator is away.
    }
  }

  /** The live stream, once the past has been read. What comes in between is in both, and steps know their place. */
  async *#messages(stop: AbortSignal): AsyncIterable<WatchJobResponse> {
    const live = statuses.watchJob({ jobId: this.id, pulseEveryMs: PULSE_MS }, { signal: stop })[Symbol.asyncIterator]();
    const first = await live.next();
    if (first.done) return;
    yield first.value;
    const [, events] = await Promise.all([this.#fetchPast(stop), statuses.listEvents({ jobId: this.id }, { signal: stop })]);
    [this.#news, this.events.value] = [[], events.events.slice(-MOST_EVENTS)];
    for (let next = await live.next(); !next.done; next = await live.next()) yield next.value;
  }

  async #fetchPast(signal: AbortSignal): Promise<void> {
    const past = await statuses.listSteps({ jobId: this.id, fromStep: 0n, limit: PAST_STEPS }, { signal });
    this.training.clear();
    for (const step of past.steps) this.training.add(Number(step.step), valuesOf(step));
    this.oneOf.value = Number(past.oneOf);
    this.#pace.ask();
  }

  /** Steps that this page was too slow for are in the store. */
  async #catchUp(): Promise<void> {
    if (this.#catchingUp) return;
    this.#catchingUp = true;
    await wait(CATCH_UP_MS, this.#stopping.signal);
    this.#catchingUp = false;
    if (this.#stopping.signal.aborted) return;
    await this.#fetchPast(this.#stopping.signal).catch(() => undefined);
  }

  #take({ update, missed }: WatchJobResponse): void {
    if (missed > 0n) void this.#catchUp();
    switch (update.case) {
      case "status":
        this.#takeStatus(update.value);
        break;
      case "pulse":
        this.#takePulse(update.value);
        return;
      case "step":
        this.training.add(Number(update.value.step), valuesOf(update.value));
        this.training.bound(MOST_POINTS);
        if (this.detail.length > 0) this.detail.add(Number(update.value.step), valuesOf(update.value));
        this.#newest = update.value;
        break;
      case "evaluation":
        this.evaluation.add(Number(update.value.step), { loss: update.value.loss });
        break;
      case "checkpoint": {
        const written = update.value;
        this.checkpoints.value = [...this.checkpoints.peek().filter(({ path }) => path !== written.path), written];
        return;
      }
      case "event":
        // A page in the background is not shown, and keeps no more than it would show.
        if (this.#news.push(update.value) > MOST_EVENTS) this.#news.shift();
        break;
    }
    this.#pace.ask();
  }

  #takeStatus(status: JobStatus): void {
    this.status.value = status;
    this.members.value = status.members;
    this.ledger.value = status.ledger ?? null;
    this.crew.value = status.crew ?? null;
    this.goodput.value = status.goodput ?? null;
    this.checkpoints.value = status.checkpoints;
    const { step, steps, epoch, loss, learningRate, gradientNorm, tokensPerSecond, etaSeconds } = status;
    this.figures.value = { step, steps, epoch, loss, learningRate, gradientNorm, tokensPerSecond, etaSeconds };
    this.evaluation.clear();
    for (const { step: at, loss: value } of status.evaluations) this.evaluation.add(Number(at), { loss: value });
  }

  #takePulse(pulse: Pulse): void {
    this.members.value = pulse.members;
    this.ledger.value = pulse.ledger ?? null;
    this.crew.value = pulse.crew ?? null;
    this.goodput.value = pulse.goodput ?? null;
    const figures = this.figures.peek();
    if (figures) this.figures.value = { ...figures, epoch: pulse.epoch, etaSeconds: pulse.etaSeconds, tokensPerSecond: pulse.tokensPerSecond };
  }

  /** A step moves the figures: the next whole status may be long in coming. */
  #follow({ step, loss, learningRate, gradientNorm }: StepRecord): void {
    const figures = this.figures.peek();
    if (figures && step > figures.step) this.figures.value = { ...figures, step, loss, learningRate, gradientNorm };
  }

  /** Shows what came. */
  #show(): void {
    batch(() => {
      if (this.#newest) this.#follow(this.#newest);
      if (this.#news.length > 0) this.events.value = [...this.events.peek(), ...this.#news].slice(-MOST_EVENTS);
      this.drawn.value++;
    });
    [this.#newest, this.#news] = [null, []];
  }
}

const valuesOf = ({ loss, learningRate, gradientNorm, tokensPerSecond }: StepRecord): Record<Curve, number> => ({ loss, learningRate, gradientNorm, tokensPerSecond });
