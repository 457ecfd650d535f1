// Every row of the data, by what became of it.

import type { Ledger } from "../gen/shanty/v1/status_pb";
import { count, percent } from "../text/format";
import { Fact, Facts } from "./Facts";

export function LedgerFacts({ ledger }: { ledger: Ledger }) {
  const all = ledger.committed + ledger.leased + ledger.remaining;
  const share = all === 0n ? 0 : Number(ledger.committed) / Number(all);
  return (
    <Facts>
      <Fact name="Committed">
        {count(ledger.committed)} <span class="muted">({percent(share)})</span>
      </Fact>
      <Fact name="Leased">{count(ledger.leased)}</Fact>
      <Fact name="Remaining">{count(ledger.remaining)}</Fact>
      <Fact name="Requeued" title="Rows that moved to another worker because theirs was lost">
        {count(ledger.requeued)}
      </Fact>
      <Fact name="Recomputed" title="Rows trained again after a return to a checkpoint">
        {count(ledger.recomputed)}
      </Fact>
      <Fact name="Skipped">{count(ledger.skipped)}</Fact>
      <Fact name="Duplicates" title="Rows that count twice in the adapter: always 0, or the job stops">
        <span class={ledger.duplicates > 0n ? "bad-text" : undefined}>{count(ledger.duplicates)}</span>
      </Fact>
    </Facts>
  );
}
