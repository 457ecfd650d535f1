import { describe, expect, it } from "vitest";

import { bytes, count, duration, figure, percent, shortId } from "../src/text/format";

describe("figures", () => {
  it("have four digits, and powers of ten only where they must", () => {
    const said = [0, 1, 12.3456, 0.012345, 12345.6, 0.0000123, 3.2e9, -1.5, Number.POSITIVE_INFINITY, Number.NaN].map((value) => figure(value));
    expect(said).toEqual(["0", "1.000", "12.35", "0.01235", "12346", "1.23e−5", "3.20e9", "−1.500", "∞", "–"]);
    expect(figure(undefined)).toBe("–");
  });
  it("group thousands without a comma that a reader could take for a point", () => {
    expect(count(1234567n)).toBe("1\u202f234\u202f567");
    expect(count(999)).toBe("999");
  });
});

describe("durations", () => {
  it("use the two largest units", () => {
    expect([0.0004, 0.35, 4.21, 59.96, 61, 3599, 7500, 273600].map(duration)).toEqual(["0 ms", "350 ms", "4.2 s", "1 min 0 s", "1 min 1 s", "59 min 59 s", "2 h 5 min", "3 d 4 h"]);
  });
  it("say nothing of what is not known", () => {
    expect([undefined, Number.NaN, -1].map(duration)).toEqual(["–", "–", "–"]);
  });
});

describe("sizes and shares", () => {
  it("are binary, and whole per cents at the ends", () => {
    expect([0, 1023, 1536, 3 * 1024 ** 3].map(bytes)).toEqual(["0 B", "1023 B", "1.50 KiB", "3.00 GiB"]);
    expect([0, 0.1234, 0.9996, 1].map(percent)).toEqual(["0 %", "12.3 %", "100 %", "100 %"]);
  });
  it("long ids are cut, short ones are not", () => {
    expect(shortId("worker-1")).toBe("worker-1");
    expect(shortId("w-01a20f3b4c4c74779e1b12dabf824578")).toBe("w-…bf824578");
  });
});
