// One job as its page shows it: the past from the coordinator's store, then every update as it comes.

import { signal } from "@preact/signals";

import { statuses } from "../api/clients";
import { follow, type Following } from "../api/stream";
import { Series } from "../chart/series";
import { JobState } from "../gen/shanty/v1/common_pb";
import type { Event, JobStatus, StepRecord, WatchJobResponse } from "../gen/shanty/v1/status_pb";

/** Steps that are asked for when a page opens, evenly spaced; live ones come one by one. */
const PAST_STEPS = 4_000;
/** Events that a page keeps. */
const MOST_EVENTS = 1_000;

export const CURVES = ["loss", "learningRate", "gradientNorm", "tokensPerSecond"] as const;
export type Curve = (typeof CURVES)[number];

export const isFinal = (state: JobState): boolean => state === JobState.SUCCEEDED || state === JobState.FAILED || state === JobState.CANCELLED;

/** A job that is being looked at. */
export class JobModel {
  readonly status = signal<JobStatus | null>(null);
  readonly events = signal<readonly Event[]>([]);
  readonly training = new Series(CURVES);
  readonly evaluation = new Series(["loss"] as const);
  /** Counts changes of the curves: they grow in place. */
  readonly drawn = signal(0);
  readonly #following: Following;
  #redraw: number | null = null;

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
    if (this.#redraw !== null) cancelAnimationFrame(this.#redraw);
  }

  /** The live stream, once the past has been read. What comes in between is in both, and steps know their place. */
  async *#messages(stop: AbortSignal): AsyncIterable<WatchJobResponse> {
    const live = statuses.watchJob({ jobId: this.id }, { signal: stop })[Symbol.asyncIterator]();
    const first = await live.next();
    if (first.done) return;
    yield first.value;
    const [past, events] = await Promise.all([
      statuses.listSteps({ jobId: this.id, fromStep: 0n, limit: PAST_STEPS }, { signal: stop }),
      statuses.listEvents({ jobId: this.id }, { signal: stop }),
    ]);
    this.training.clear();
    for (const step of past.steps) this.#addStep(step);
    this.events.value = events.events.slice(-MOST_EVENTS);
    this.#changed();
    for (let next = await live.next(); !next.done; next = await live.next()) yield next.value;
  }

  #take({ update }: WatchJobResponse): void {
    switch (update.case) {
      case "status":
        this.status.value = update.value;
        this.evaluation.clear();
        for (const { step, loss } of update.value.evaluations) this.evaluation.add(Number(step), { loss });
        break;
      case "step":
        this.#addStep(update.value);
        this.#follow(update.value);
        break;
      case "evaluation":
        this.evaluation.add(Number(update.value.step), { loss: update.value.loss });
        break;
      case "checkpoint": {
        const status = this.status.peek();
        if (status) this.status.value = { ...status, checkpoints: [...status.checkpoints, update.value] };
        break;
      }
      case "event":
        this.events.value = [...this.events.peek(), update.value].slice(-MOST_EVENTS);
        break;
    }
    this.#changed();
  }

  #addStep(step: StepRecord): void {
    this.training.add(Number(step.step), {
      loss: step.loss,
      learningRate: step.learningRate,
      gradientNorm: step.gradientNorm,
      tokensPerSecond: step.tokensPerSecond,
    });
  }

  /** A step moves the figures of the status, too: the next whole status may be long in coming. */
  #follow(step: StepRecord): void {
    const status = this.status.peek();
    if (!status || step.step <= status.step) return;
    const { loss, learningRate, gradientNorm, tokensPerSecond } = step;
    const left = Number(status.steps - step.step);
    const pace = status.etaSeconds !== undefined && status.steps > status.step ? status.etaSeconds / Number(status.steps - status.step) : undefined;
    const next: JobStatus = { ...status, step: step.step, loss, learningRate, gradientNorm, tokensPerSecond };
    if (pace !== undefined) next.etaSeconds = pace * left;
    this.status.value = next;
  }

  /** At most one drawing a frame, however fast steps come. */
  #changed(): void {
    this.#redraw ??= requestAnimationFrame(() => {
      this.#redraw = null;
      this.drawn.value++;
    });
  }
}
