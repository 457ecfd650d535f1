// A button that asks once more before it acts, and says what came of it.

import { useEffect, useId, useRef, useState } from "preact/hooks";

import { messageOf } from "../api/clients";

interface Props {
  /** On the button. */
  name: string;
  /** What is asked. */
  question: string;
  /** On the button that does it. */
  yes: string;
  /** Does it; gives words for people. */
  act: () => Promise<string>;
  /** It cannot be taken back. */
  grave?: boolean;
  /** For those who hear the button: what it is about, where the name alone does not say. */
  about?: string;
}

export function Confirm({ name, question, yes, act, grave, about }: Props) {
  const [asking, setAsking] = useState(false);
  const [busy, setBusy] = useState(false);
  const [answer, setAnswer] = useState<{ text: string; good: boolean } | null>(null);
  const dialog = useRef<HTMLDialogElement>(null);
  const words = useId();

  useEffect(() => {
    if (asking) dialog.current?.showModal();
  }, [asking]);

  async function go(): Promise<void> {
    setAsking(false);
    setBusy(true);
    try {
      setAnswer({ text: await act(), good: true });
    } catch (error) {
      setAnswer({ text: messageOf(error), good: false });
    }
    setBusy(false);
  }

  return (
    <span class="confirm">
      <button type="button" disabled={busy} aria-label={about ? `${name} ${about}` : undefined} onClick={() => (setAnswer(null), setAsking(true))}>
        {name}
      </button>
      {asking ? (
        <dialog ref={dialog} aria-labelledby={words} onClose={() => setAsking(false)}>
          <p id={words}>{question}</p>
          <div class="row">
            <button type="button" class={grave ? "bad" : "main"} onClick={() => void go()}>
              {yes}
            </button>
            <button type="button" autofocus onClick={() => setAsking(false)}>
              Do nothing
            </button>
          </div>
        </dialog>
      ) : null}
      {answer ? (
        <span class={answer.good ? "muted" : "bad-text"} role={answer.good ? "status" : "alert"}>
          {answer.text}
        </span>
      ) : null}
    </span>
  );
}
