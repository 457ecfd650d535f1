// Who is let in: signing in with a token, and what is offered to those who may only look.

import { Crew, until } from "./crew.mjs";
import { assert } from "./checks.mjs";

export async function doors(checks, program) {
  const crew = new Crew(program);
  const { check } = { check: checks.check.bind(checks) };
  try {
    await crew.start();
    crew.addWorker();
    const job = await crew.submit({ name: "guarded", lines: 2_000, steps: 4_000, batch: 48 });
    const reader = await crew.makeToken("read");

    await check("without a token the page asks for one, and shows nothing", async () => {
      const page = await checks.open(`${crew.address}/jobs/${job}`);
      const field = page.getByLabel("Token");
      await field.waitFor();
      assert((await page.getByTestId("step").count()) === 0, "something is shown");
      await checks.audit(page, "sign-in");
      await checks.picture(page, "sign-in");
      await field.fill("shanty-000000000000-nonsense");
      await page.getByRole("button", { name: "Sign in" }).click();
      await page.getByText(/no token|unknown, expired or revoked/).waitFor();
      await field.fill(crew.token);
      await page.getByRole("button", { name: "Sign in" }).click();
      await page.getByTestId("step").waitFor();
      await page.getByRole("button", { name: "Cancel job…" }).waitFor();
      await page.reload();
      await page.getByTestId("step").waitFor();
      await page.getByRole("button", { name: "Sign out" }).click();
      await field.waitFor();
      await page.reload();
      await field.waitFor();
    });

    await check("who may only look is offered nothing to do", async () => {
      const page = await checks.open(`${crew.address}/jobs/${job}#token=${reader}`);
      await page.getByTestId("step").waitFor();
      await page.getByText(/may look/).waitFor();
      await page.getByRole("region", { name: "Members, table" }).waitFor();
      assert((await page.getByRole("button", { name: /Cancel|Checkpoint now|Drain/ }).count()) === 0, "actions are offered");
      assert(!page.url().includes("token"), page.url());
    });

    await check("a token that is taken back ends the page's streams, and it asks again", async () => {
      const page = await checks.open(`${crew.address}/jobs/${job}#token=${reader}`);
      await page.getByTestId("step").waitFor();
      await crew.run(["token", "revoke", "reader", "--coordinator", crew.address]);
      await page.getByLabel("Token").waitFor({ timeout: 20_000 });
    });

    await check("every answer of a page carries a strict policy", async () => {
      const page = await fetch(crew.address);
      const policy = page.headers.get("content-security-policy");
      assert(policy?.startsWith("default-src 'none'") && !policy.includes("unsafe"), policy);
      assert(page.headers.get("cache-control") === "no-cache", "the page itself is asked for anew");
      const script = /src="(\/assets\/[^"]+)"/.exec(await page.text())[1];
      const asset = await fetch(crew.address + script);
      assert(asset.headers.get("cache-control")?.includes("immutable"), "assets are kept");
      await until("no answer to a foreign page", async () => {
        const preflight = await fetch(`${crew.address}/shanty.v1.JobService/ListJobs`, { method: "OPTIONS", headers: { origin: "https://example.org", "access-control-request-method": "POST" } });
        return preflight.headers.get("access-control-allow-origin") === null;
      });
    });
  } finally {
    await checks.close();
    await crew.stop();
  }
}
