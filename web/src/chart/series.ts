// Points of a curve in columns that grow, and fewer of them where a screen cannot show more.

/** Points of several curves over one axis of steps. Steps rise; a repeat (after a return to a checkpoint) takes the place of what followed. */
export class Series<Name extends string> {
  readonly steps: number[] = [];
  readonly columns: Record<Name, number[]>;
  readonly #names: readonly Name[];

  constructor(names: readonly Name[]) {
    this.#names = names;
    this.columns = Object.fromEntries(names.map((name) => [name, []])) as unknown as Record<Name, number[]>;
  }

  get length(): number {
    return this.steps.length;
  }

  /** Adds a point. Points at its step and beyond are dropped: the job went back. */
  add(step: number, values: Record<Name, number>): void {
    const at = this.#firstFrom(step);
    if (at < this.steps.length) {
      this.steps.length = at;
      for (const name of this.#names) this.columns[name].length = at;
    }
    this.steps.push(step);
    for (const name of this.#names) this.columns[name].push(values[name]);
  }

  /** Drops every other point of the older half, once there are more than `most`: memory has a bound, the newest keep all detail. */
  bound(most: number): void {
    if (this.steps.length <= most) return;
    const half = this.steps.length >> 1;
    const stays = (_: number, at: number): boolean => at >= half || at % 2 === 0;
    const kept = this.steps.filter(stays);
    for (const name of this.#names) replace(this.columns[name], this.columns[name].filter(stays));
    replace(this.steps, kept);
  }

  clear(): void {
    this.steps.length = 0;
    for (const name of this.#names) this.columns[name].length = 0;
  }

  /** The place of the first step that is not below `step`. */
  #firstFrom(step: number): number {
    // Almost always the end.
    if (this.steps.length === 0 || (this.steps[this.steps.length - 1] as number) < step) return this.steps.length;
    let [low, high] = [0, this.steps.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if ((this.steps[middle] as number) < step) low = middle + 1;
      else high = middle;
    }
    return low;
  }
}

/** A column keeps its identity: charts hold on to it. */
function replace(column: number[], values: readonly number[]): void {
  column.length = values.length;
  for (let at = 0; at < values.length; at++) column[at] = values[at] as number;
}

/** Exponential moving average that starts unbiased; gaps (NaN) stay gaps. `weight` of the past, 0 for none. */
export function smooth(values: readonly number[], weight: number): number[] {
  if (weight <= 0) return values.slice();
  let [sum, norm] = [0, 0];
  return values.map((value) => {
    if (Number.isNaN(value)) return value;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

/** Columns with at most about `most` points: of each bucket the least and the greatest of the first column, in order, so that no spike is lost. */
export function thin(steps: readonly number[], columns: readonly (readonly number[])[], most: number): [number[], number[][]] {
  const lead = columns[0];
  if (!lead || steps.length <= most || most < 4) return [steps.slice(), columns.map((column) => column.slice())];
  const buckets = Math.floor(most / 2);
  const kept: number[] = [];
  for (let bucket = 0; bucket < buckets; bucket++) {
    const from = Math.floor((bucket * steps.length) / buckets);
    const to = Math.floor(((bucket + 1) * steps.length) / buckets);
    let [least, greatest] = [from, from];
    for (let at = from; at < to; at++) {
      if ((lead[at] as number) < (lead[least] as number) || Number.isNaN(lead[least])) least = at;
      if ((lead[at] as number) > (lead[greatest] as number) || Number.isNaN(lead[greatest])) greatest = at;
    }
    for (const at of new Set([Math.min(least, greatest), Math.max(least, greatest)])) kept.push(at);
  }
  // The newest point is always shown.
  if (kept[kept.length - 1] !== steps.length - 1) kept.push(steps.length - 1);
  return [kept.map((at) => steps[at] as number), columns.map((column) => kept.map((at) => column[at] as number))];
}
