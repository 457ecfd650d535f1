import { describe, expect, it } from "vitest";

import { Series, smooth, thin } from "../src/chart/series";

describe("a series", () => {
  it("goes back where the job goes back to a checkpoint", () => {
    const series = new Series(["loss"] as const);
    for (const step of [1, 2, 3, 4]) series.add(step, { loss: step });
    series.add(3, { loss: 30 });
    expect(series.steps).toEqual([1, 2, 3]);
    expect(series.columns.loss).toEqual([1, 2, 30]);
  });
  it("keeps its columns, its ends and all newer points where it is thinned", () => {
    const series = new Series(["loss"] as const);
    const { steps } = series;
    const { loss } = series.columns;
    for (let step = 0; step < 101; step++) series.add(step, { loss: -step });
    series.bound(100);
    expect(series.steps).toBe(steps);
    expect(series.columns.loss).toBe(loss);
    expect(steps.length).toBe(loss.length);
    expect(steps.slice(0, 3)).toEqual([0, 2, 4]);
    expect(steps.slice(-51)).toEqual(Array.from({ length: 51 }, (_, at) => at + 50));
    expect(loss.at(-1)).toBe(-100);
  });
  it("takes a repeat of the newest point once", () => {
    const series = new Series(["loss"] as const);
    series.add(1, { loss: 1 });
    series.add(1, { loss: 1 });
    expect(series.length).toBe(1);
  });
});

describe("smoothing", () => {
  it("keeps a constant, and leaves gaps", () => {
    expect(smooth([2, 2, 2], 0.9).map((value) => value.toFixed(6))).toEqual(["2.000000", "2.000000", "2.000000"]);
    expect(smooth([1, Number.NaN, 1], 0.5)[1]).toBeNaN();
    expect(smooth([1, 5], 0)).toEqual([1, 5]);
  });
});

describe("thinning", () => {
  const steps = Array.from({ length: 100_000 }, (_, index) => index);
  const values = steps.map((step) => Math.sin(step / 700));
  it("keeps every spike and the ends", () => {
    const spiked = values.slice();
    spiked[54_321] = 100;
    const [kept, [column]] = thin(steps, [spiked], 1_000) as [number[], [number[]]];
    expect(kept.length).toBeLessThanOrEqual(1_001);
    expect(column).toContain(100);
    expect(kept[kept.length - 1]).toBe(99_999);
    expect(kept).toEqual(kept.toSorted((one, other) => one - other));
  });
  it("leaves what fits as it is", () => {
    expect(thin([1, 2], [[3, 4]], 1_000)).toEqual([[1, 2], [[3, 4]]]);
  });
});
