import { expect, it } from "vitest";

import { comparePath, jobPath, parse } from "../src/router";

const at = (path: string) => parse(new URL(path, "http://localhost"));

it("knows its pages", () => {
  expect(at("/")).toEqual({ page: "jobs" });
  expect(at("/jobs/")).toEqual({ page: "jobs" });
  expect(at(jobPath("a b/c"))).toEqual({ page: "job", job: "a b/c" });
  expect(at(comparePath(["x", "y&z"]))).toEqual({ page: "compare", jobs: ["x", "y&z"] });
  expect(at("/queue")).toEqual({ page: "queue" });
  expect(at("/jobs/100%")).toEqual({ page: "job", job: "100%" });
  expect(at("/else")).toEqual({ page: "missing", path: "/else" });
});
