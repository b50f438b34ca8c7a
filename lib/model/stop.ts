/** Stop strings in a text that comes in pieces: nothing of one is ever let out. */
import { invalid } from '../errors';

export class StopFilter {
  private held = '';
  private found: string | undefined;

  constructor(private readonly stops: readonly string[]) {
    for (const stop of stops)
      if (typeof stop !== 'string' || stop === '' || /\p{Surrogate}/u.test(stop))
        throw invalid('A stop string must be a text of at least one character.');
  }

  /** The stop string that ended the text. */
  get stop(): string | undefined {
    return this.found;
  }

  /** What is certain by now: everything but an end that could still become a stop string; '' after one. */
  push(text: string): string {
    if (this.found !== undefined) return '';
    const all = this.held + text;
    const match = this.first(all);
    if (match) {
      this.found = match.stop;
      this.held = '';
      return all.slice(0, match.at);
    }
    const safe = all.length - this.open(all);
    this.held = all.slice(safe);
    return all.slice(0, safe);
  }

  /** What was held back, since nothing follows. */
  end(): string {
    const text = this.held;
    this.held = '';
    return text;
  }

  /** The stop string that is complete first, of several with one end the longest: however the text was cut. */
  private first(text: string): { stop: string; at: number } | undefined {
    let best: { stop: string; at: number } | undefined;
    for (const stop of this.stops) {
      const at = text.indexOf(stop);
      if (at < 0) continue;
      const [end, known] = [at + stop.length, best ? best.at + best.stop.length : Infinity];
      if (end < known || (end === known && at < best!.at)) best = { stop, at };
    }
    return best;
  }

  /** Length of the longest end of `text` that begins a stop string. */
  private open(text: string): number {
    let longest = 0;
    for (const stop of this.stops)
      for (let length = Math.min(stop.length - 1, text.length); length > longest; length--)
        if (text.endsWith(stop.slice(0, length))) longest = length;
    return longest;
  }
}
