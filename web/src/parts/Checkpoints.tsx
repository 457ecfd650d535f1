// Points that the job can go on from, the newest first.

import type { Checkpoint } from "../gen/shanty/v1/job_pb";
import { ago, bytes, count, duration } from "../text/format";
import { Table, type Column } from "./Table";

const columns: Column<Checkpoint>[] = [
  { name: "Step", number: true, cell: ({ step }) => count(step) },
  { name: "Written", cell: ({ writtenUnixMs }) => ago(writtenUnixMs) },
  { name: "Size", number: true, cell: ({ sizeBytes }) => bytes(sizeBytes) },
  { name: "Took", number: true, cell: ({ seconds }) => duration(seconds) },
  { name: "Attempt", number: true, cell: ({ attempt }) => attempt },
  { name: "Where", cell: ({ path }) => <code>{path}</code> },
];

export function Checkpoints({ checkpoints }: { checkpoints: readonly Checkpoint[] }) {
  return <Table caption="Checkpoints" columns={columns} rows={checkpoints.toReversed()} rowKey={({ path }) => path} empty="None yet." />;
}
