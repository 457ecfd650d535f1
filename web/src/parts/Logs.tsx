// The workers' logs as they come: by worker, by level, by text. The coordinator filters, so that no line travels for nothing.

import { useEffect, useRef, useState } from "preact/hooks";

import { statuses } from "../api/clients";
import { follow, type Connection } from "../api/stream";
import type { LogLine, Member } from "../gen/shanty/v1/status_pb";
import { clock, count, shortId } from "../text/format";
import { Pace } from "../state/pace";
import { Freshness } from "./State";

const LEVELS = ["error", "warn", "info", "debug", "trace"] as const;
/** Lines that a page keeps. */
const MOST_LINES = 500;
/** After the last letter of a text. */
const PAUSE_MS = 250;

/** A line, and what tells it from all others. */
interface Line extends LogLine {
  key: number;
}

export function Logs({ job, members, ended }: { job: string; members: readonly Member[]; ended: boolean }) {
  const [worker, setWorker] = useState("");
  const [level, setLevel] = useState<(typeof LEVELS)[number]>("info");
  const [text, setText] = useState("");
  const [lines, setLines] = useState<readonly Line[]>([]);
  const [connection, setConnection] = useState<Connection>({ state: "connecting", reason: "" });
  const [wanted, setWanted] = useState("");
  const [missed, setMissed] = useState(0n);
  const end = useRef<HTMLDivElement>(null);
  const following = useRef(true);

  useEffect(() => {
    setLines([]);
    setMissed(0n);
    let [kept, next, lost, fresh] = [[] as Line[], 0, 0n, true];
    const pace = new Pace(() => (setLines(kept), setMissed(lost)));
    const stream = follow(
      (signal) => ((fresh = true), statuses.tailLogs({ jobId: job, workerId: worker, level, text: wanted, follow: !ended }, { signal })),
      (message) => {
        const lines = message.lines.map((line): Line => ({ ...line, key: next++ }));
        // A stream that begins again brings the past again.
        kept = [...(fresh ? [] : kept), ...lines].slice(-MOST_LINES);
        fresh = false;
        lost += message.missed;
        pace.ask();
      },
      () => ended,
    );
    const stop = stream.connection.subscribe(setConnection);
    return () => (stop(), stream.stop(), pace.stop());
  }, [job, worker, level, wanted, ended]);

  // The coordinator looks through all that it keeps, not every letter that is typed.
  useEffect(() => {
    const timer = setTimeout(() => setWanted(text.trim()), PAUSE_MS);
    return () => clearTimeout(timer);
  }, [text]);

  useEffect(() => {
    const box = end.current;
    if (box && following.current) box.scrollTop = box.scrollHeight;
  }, [lines]);

  return (
    <>
      <form class="filters" onSubmit={(event) => event.preventDefault()}>
        <label>
          Worker{" "}
          <select value={worker} onChange={({ currentTarget }) => setWorker(currentTarget.value)}>
            <option value="">all</option>
            {members.map(({ workerId, rank }) => (
              <option value={workerId} key={workerId}>
                {rank === undefined ? "" : `${rank}: `}
                {shortId(workerId)}
              </option>
            ))}
          </select>
        </label>
        <label>
          Level{" "}
          <select value={level} onChange={({ currentTarget }) => setLevel(currentTarget.value as (typeof LEVELS)[number])}>
            {LEVELS.map((name) => (
              <option key={name}>{name}</option>
            ))}
          </select>
        </label>
        <label>
          Text <input type="search" value={text} onInput={({ currentTarget }) => setText(currentTarget.value)} />
        </label>
      </form>
      <Freshness connection={connection} />
      {missed > 0n ? (
        <p class="muted">{count(missed)} lots of lines came faster than this page reads: they are left out here.</p>
      ) : null}
      <div
        ref={end}
        class="log"
        role="log"
        aria-label="Log lines"
        tabIndex={0}
        onScroll={({ currentTarget: box }) => (following.current = box.scrollHeight - box.scrollTop - box.clientHeight < 24)}
      >
        {lines.length === 0 ? <p class="muted">No line matches.</p> : null}
        {lines.map((line) => (
          <div class={`line ${line.level}`} key={line.key}>
            <time>{clock(line.unixMs)}</time> <span class="level">{line.level}</span> <code title={line.workerId}>{shortId(line.workerId)}</code> <span>{line.text}</span>
          </div>
        ))}
      </div>
    </>
  );
}
