import { describe, expect, it } from "vitest";

import { rowsOf } from "../src/text/configuration";

describe("a job file", () => {
  it("is shown as its keys are written, and what is not set is left out", () => {
    const json = JSON.stringify({ name: "pirate", train: { steps: null, seed: 17 }, adapter: { target_modules: ["q", "v"] } });
    expect(rowsOf(json)).toEqual([
      ["name", '"pirate"'],
      ["train.seed", "17"],
      ["adapter.target_modules", '["q","v"]'],
    ]);
  });
});
