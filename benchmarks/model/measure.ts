/** Everyone in turn: prefill chunk by chunk, decoding round by round. */
import { median } from '../cpu/measure';
import { type Contender, type Step, type Timing } from './contender';

export interface Plan {
  /** Tokens in the cache while decoding is timed. */
  readonly contexts: readonly number[];
  readonly rounds: number;
  /** Tokens decoded by each contender in a round. */
  readonly tokens: number;
  readonly chunk: number;
  readonly prompt: Int32Array;
}

/** A median with the 10th and the 90th percentile. */
export interface Spread {
  readonly median: number;
  readonly low: number;
  readonly high: number;
}

export interface Row {
  readonly contender: string;
  readonly peer: boolean;
  readonly bitsPerValue: number;
  readonly cacheBytes: number | undefined;
  /** Of everything up to this context. */
  readonly prefillTokensPerSecond: number;
  /** Milliseconds per token of all threads. */
  readonly prefillProcessorMilliseconds: number;
  /** Time of the baseline over this one's, for the same prompt. */
  readonly prefillOverBaseline: number;
  readonly decodeMilliseconds: Spread;
  readonly decodeTokensPerSecond: number;
  readonly processorMilliseconds: Spread;
  /** Time of the baseline over this one's, round by round. */
  readonly overBaseline: Spread;
  /** Medians of milliseconds in each part; absent where the contender does not tell. */
  readonly parts?: { readonly products: number; readonly append: number; readonly attend: number };
}

export interface Cell {
  readonly tokens: number;
  /** Against whom the ratios are: the first peer, else the first contender. */
  readonly baseline: string;
  readonly rows: readonly Row[];
}

function spread(values: readonly number[]): Spread {
  const sorted = [...values].sort((a, b) => a - b);
  const at = (part: number) => sorted[Math.round(part * (sorted.length - 1))]!;
  return { median: median(sorted), low: at(0.1), high: at(0.9) };
}

/** Everyone once, each time beginning with another one. */
async function inTurn<T>(
  contenders: readonly Contender[],
  first: number,
  work: (contender: Contender) => Promise<T>,
): Promise<Map<Contender, T>> {
  const results = new Map<Contender, T>();
  for (let i = 0; i < contenders.length; i++) {
    const contender = contenders[(first + i) % contenders.length]!;
    results.set(contender, await work(contender));
  }
  return results;
}

export async function measure(
  contenders: readonly Contender[],
  { contexts, rounds, tokens, chunk, prompt }: Plan,
  progress: (part: number, what: string) => void,
): Promise<Cell[]> {
  const baseline = contenders.find(({ peer }) => peer) ?? contenders[0]!;
  const prefills = new Map(contenders.map((one): [Contender, Timing[]] => [one, []]));
  const cells: Cell[] = [];
  let done = 0;
  const last = Math.max(...contexts);
  for (const context of [...new Set(contexts)].sort((a, b) => a - b)) {
    for (let turn = 0; done < context; turn++) {
      const piece = prompt.subarray(done, Math.min(done + chunk, context));
      progress(done / last, `prefill of ${context} tokens`);
      const times = await inTurn(contenders, turn, (one) => one.prefill(piece));
      for (const [one, time] of times) prefills.get(one)!.push(time);
      done += piece.length;
    }
    const decoded: Map<Contender, Step[]>[] = [];
    for (let round = 0; round < rounds; round++) {
      progress(done / last, `decoding at ${context} tokens, round ${round + 1}`);
      // The first token finds a cold cache and shared pages.
      decoded.push(
        await inTurn(contenders, round, async (one) => (await one.decode(7, tokens + 1)).slice(1)),
      );
    }
    const total = (one: Contender, part: keyof Timing) =>
      prefills.get(one)!.reduce((sum, time) => sum + time[part], 0);
    const rows = contenders.map((one): Row => {
      const steps = decoded.flatMap((round) => round.get(one)!);
      const milliseconds = spread(steps.map(({ seconds }) => 1000 * seconds));
      const ofRound = (round: Map<Contender, Step[]>, who: Contender) =>
        median(round.get(who)!.map(({ seconds }) => seconds));
      const part = (name: keyof NonNullable<Step['parts']>) =>
        1000 * median(steps.map(({ parts }) => parts![name]));
      return {
        contender: one.name,
        peer: one.peer,
        bitsPerValue: one.bitsPerValue,
        cacheBytes: one.cacheBytes(),
        prefillTokensPerSecond: context / total(one, 'seconds'),
        prefillProcessorMilliseconds: (1000 * total(one, 'processorSeconds')) / context,
        prefillOverBaseline: total(baseline, 'seconds') / total(one, 'seconds'),
        decodeMilliseconds: milliseconds,
        decodeTokensPerSecond: 1000 / milliseconds.median,
        processorMilliseconds: spread(steps.map(({ processorSeconds }) => 1000 * processorSeconds)),
        overBaseline: spread(decoded.map((round) => ofRound(round, baseline) / ofRound(round, one))),
        ...(steps[0]!.parts && {
          parts: { products: part('products'), append: part('append'), attend: part('attend') },
        }),
      };
    });
    cells.push({ tokens: context, baseline: baseline.name, rows });
  }
  return cells;
}
