// How often something is shown that changes all the time: not more often than eyes follow, and not while nobody looks.

/** Milliseconds from one showing to the next. */
const LEAST_GAP_MS = 100;

export class Pace {
  #asked = false;
  #shown = -Infinity;
  #timer: ReturnType<typeof setTimeout> | null = null;
  #frame: number | null = null;

  constructor(private readonly show: () => void) {}

  /** There is something new. It is shown soon, with whatever else comes until then. */
  ask(): void {
    if (this.#asked) return;
    this.#asked = true;
    this.#timer = setTimeout(
      () => {
        // A page in the background gets no frame before it is looked at.
        this.#frame = requestAnimationFrame(() => {
          this.#asked = false;
          this.#shown = performance.now();
          this.show();
        });
      },
      Math.max(0, this.#shown + LEAST_GAP_MS - performance.now()),
    );
  }

  stop(): void {
    if (this.#timer !== null) clearTimeout(this.#timer);
    if (this.#frame !== null) cancelAnimationFrame(this.#frame);
    this.#asked = true;
  }
}
