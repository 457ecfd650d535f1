import { describe, expect, it } from "vitest";

import { tokenOf } from "../src/api/session";

describe("the token of an address", () => {
  it("is in the fragment that shanty prints", () => {
    expect(tokenOf("#token=shanty-0123456789ab-Zm9v")).toBe("shanty-0123456789ab-Zm9v");
  });
  it("is none where there is no such fragment", () => {
    for (const fragment of ["", "#", "#main", "#token=", "#token=%20"]) expect(tokenOf(fragment), fragment).toBeNull();
  });
});
