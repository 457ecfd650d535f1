// Points that the job can go on from, the newest first, and whether the store has them now.

import { useState } from "preact/hooks";

import { jobs, messageOf } from "../api/clients";
import type { Checkpoint } from "../gen/shanty/v1/job_pb";
import { ago, bytes, count, duration, figure } from "../text/format";
import { Fact, Facts } from "./Facts";
import { Table, type Column } from "./Table";

type Found = ReadonlySet<string> | string | null;

export function Checkpoints({ job, checkpoints }: { job: string; checkpoints: readonly Checkpoint[] }) {
  const [found, setFound] = useState<Found>(null);
  const newest = checkpoints.reduce<Checkpoint | null>((best, one) => (best && best.step > one.step ? best : one), null);

  async function look(): Promise<void> {
    try {
      const { checkpoints: there } = await jobs.listCheckpoints({ jobId: job });
      setFound(new Set(there.map(({ path }) => path)));
    } catch (error) {
      setFound(messageOf(error));
    }
  }

  const columns: Column<Checkpoint>[] = [
    { name: "Step", number: true, cell: ({ step }) => count(step) },
    { name: "Written", cell: ({ writtenUnixMs }) => ago(writtenUnixMs) },
    { name: "Size", number: true, cell: ({ sizeBytes }) => bytes(sizeBytes) },
    { name: "Took", number: true, cell: ({ seconds }) => duration(seconds) },
    { name: "Eval loss", number: true, cell: ({ loss }) => figure(loss) },
    { name: "Attempt", number: true, cell: ({ attempt }) => attempt },
    { name: "Where", cell: ({ path }) => <code>{path}</code> },
  ];
  if (found instanceof Set) {
    columns.push({ name: "In the store", cell: ({ path }) => (found.has(path) ? <span class="good-text">whole manifest</span> : <span class="bad-text">not there</span>) });
  }

  return (
    <>
      {newest ? (
        <Facts>
          <Fact name="Last durable step">{count(newest.step)}</Fact>
          <Fact name="Age">{ago(newest.writtenUnixMs)}</Fact>
          <Fact name="Size">{bytes(newest.sizeBytes)}</Fact>
          <Fact name="Took">{duration(newest.seconds)}</Fact>
        </Facts>
      ) : null}
      <Table caption="Checkpoints" columns={columns} rows={checkpoints.toReversed()} rowKey={({ path }) => path} empty="None yet." />
      {checkpoints.length > 0 ? (
        <div class="row">
          <button type="button" onClick={() => void look()}>
            Look into the store
          </button>
          {typeof found === "string" ? (
            <span class="bad-text" role="alert">
              {found}
            </span>
          ) : null}
        </div>
      ) : null}
    </>
  );
}
