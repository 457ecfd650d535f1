// The job as it was submitted, and what was learnt of it before its first step.

import { useEffect, useState } from "preact/hooks";

import { messageOf, statuses } from "../api/clients";
import type { GetConfigurationResponse } from "../gen/shanty/v1/status_pb";
import { rowsOf } from "../text/configuration";
import { count, duration, percent } from "../text/format";
import { Fact, Facts } from "./Facts";

/** Asked for when it is opened, and again whenever more may be known. */
export function Configuration({ job, known }: { job: string; known: string }) {
  const [found, setFound] = useState<GetConfigurationResponse | string | null>(null);
  useEffect(() => {
    const stopping = new AbortController();
    statuses.getConfiguration({ jobId: job }, { signal: stopping.signal }).then(setFound, (error: unknown) => {
      if (!stopping.signal.aborted) setFound(messageOf(error));
    });
    return () => stopping.abort();
  }, [job, known]);

  if (found === null) return <p class="muted">…</p>;
  if (typeof found === "string") {
    return (
      <p class="bad-text" role="alert">
        {found}
      </p>
    );
  }
  const { data, adapter, specJson } = found;
  return (
    <>
      <Facts>
        {adapter ? (
          <>
            <Fact name="Trained">
              {count(adapter.trainableParameters)}{" "}
              {adapter.totalParameters > 0n ? <span class="muted">of {count(adapter.totalParameters)} ({percent(Number(adapter.trainableParameters) / Number(adapter.totalParameters))})</span> : null}
            </Fact>
            <Fact name="Modules">{count(adapter.matchedModules)}</Fact>
            <Fact name="Base loaded in">{duration(adapter.loadSeconds)}</Fact>
          </>
        ) : null}
        {data ? (
          <>
            <Fact name="Rows to train">{count(data.trainRows)}</Fact>
            <Fact name="Rows held out">{count(data.evalRows)}</Fact>
            <Fact name="Trained tokens an epoch">
              {count(data.trainTrainedTokens)} <span class="muted">of {count(data.trainTokens)}</span>
            </Fact>
            <Fact name="Steps an epoch">{count(data.stepsPerEpoch)}</Fact>
          </>
        ) : null}
      </Facts>
      {data?.warnings.map((warning) => (
        <p class="banner warn" key={warning}>
          {warning}
        </p>
      ))}
      <div class="scroll" tabIndex={0} role="region" aria-label="Job file">
        <table class="plain">
          <caption class="unseen">The job file as it was submitted, all defaults filled in</caption>
          <thead>
            <tr>
              <th scope="col">Key</th>
              <th scope="col">Value</th>
            </tr>
          </thead>
          <tbody>
            {rowsOf(specJson).map(([key, value]) => (
              <tr key={key}>
                <th scope="row">
                  <code>{key}</code>
                </th>
                <td>
                  <code>{value}</code>
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </>
  );
}
