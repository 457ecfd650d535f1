// The workers' logs as they come: by worker, by level, by text.

import { useEffect, useMemo, useRef, useState } from "preact/hooks";

import { statuses } from "../api/clients";
import { follow, type Connection } from "../api/stream";
import type { LogLine, Member } from "../gen/shanty/v1/status_pb";
import { clock, shortId } from "../text/format";
import { Freshness } from "./State";

const LEVELS = ["error", "warn", "info", "debug", "trace"] as const;
/** Lines that a page keeps. */
const MOST_LINES = 2_000;

export function Logs({ job, members, ended }: { job: string; members: readonly Member[]; ended: boolean }) {
  const [worker, setWorker] = useState("");
  const [level, setLevel] = useState<(typeof LEVELS)[number]>("info");
  const [text, setText] = useState("");
  const [lines, setLines] = useState<readonly LogLine[]>([]);
  const [connection, setConnection] = useState<Connection>({ state: "connecting", reason: "" });
  const end = useRef<HTMLDivElement>(null);
  const following = useRef(true);

  useEffect(() => {
    setLines([]);
    let fresh = true;
    const stream = follow(
      (signal) => ((fresh = true), statuses.tailLogs({ jobId: job, workerId: worker, follow: !ended }, { signal })),
      (message) => {
        // A stream that begins again brings the past again.
        setLines((before) => [...(fresh ? [] : before), ...message.lines].slice(-MOST_LINES));
        fresh = false;
      },
      () => ended,
    );
    const stop = stream.connection.subscribe(setConnection);
    return () => (stop(), stream.stop());
  }, [job, worker, ended]);

  const shown = useMemo(() => {
    const [most, wanted] = [LEVELS.indexOf(level), text.toLowerCase()];
    return lines.filter((line) => LEVELS.indexOf(line.level as (typeof LEVELS)[number]) <= most && (wanted === "" || line.text.toLowerCase().includes(wanted)));
  }, [lines, level, text]);

  useEffect(() => {
    const box = end.current;
    if (box && following.current) box.scrollTop = box.scrollHeight;
  }, [shown]);

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
      <div
        ref={end}
        class="log"
        role="log"
        aria-label="Log lines"
        tabIndex={0}
        onScroll={({ currentTarget: box }) => (following.current = box.scrollHeight - box.scrollTop - box.clientHeight < 24)}
      >
        {shown.length === 0 ? <p class="muted">No line matches.</p> : null}
        {shown.map((line, index) => (
          <div class={`line ${line.level}`} key={`${line.unixMs}-${index}`}>
            <time>{clock(line.unixMs)}</time> <span class="level">{line.level}</span> <code title={line.workerId}>{shortId(line.workerId)}</code> <span>{line.text}</span>
          </div>
        ))}
      </div>
    </>
  );
}
