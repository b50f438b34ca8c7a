/** Times of one backend at one context: every scheme and both dense baselines in turn, round after round. */
import { createBackend, denseAttentionSync, KvCache, schemeNamed } from '../../lib';
import { type Backend, type Sequence } from '../../lib';
import { PERIOD, denseOf, type Workload } from './workload';

const ROPE = { base: 500000, layout: 'half' } as const;
export const WINDOWS = { sink: 32, recent: 96 };
const SINGLE_APPENDS = 256;

export interface Setting {
  readonly isa: string;
  readonly threads: number;
  /** Tokens of each sequence. */
  readonly tokens: number;
  /** Sequences of one attendBatch call. */
  readonly batch: number;
}

export interface AttendTime {
  /** Median of one decode step: one query token per sequence, one layer, all heads. */
  readonly attendMicroseconds: number;
  /** What is read for it: everything the sequences hold, or the dense keys and values. */
  readonly bytes: number;
  readonly gigabytesPerSecond: number;
}

export interface SchemeTime extends AttendTime {
  readonly scheme: string;
  readonly bitsPerValue: number;
  /** Median over rounds of the dense time over this one in the same round. */
  readonly overFp32: number;
  readonly overFp16: number;
  /** One layer, one token a call. */
  readonly appendTokensPerSecond: number;
  /** One layer, PERIOD tokens a call. */
  readonly bulkTokensPerSecond: number;
  /** Rms of the difference to float32 attention over rms of that, on synthetic numbers: says that work was done. */
  readonly relativeError: number;
}

export interface Cell extends Setting {
  readonly rounds: number;
  readonly fp32: AttendTime;
  readonly fp16: AttendTime;
  readonly schemes: readonly SchemeTime[];
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** On a busy machine the processor time of one thread says more than the wall clock. */
export type Clock = 'wall' | 'processor';
let now: () => number = () => performance.now();

export function chooseClock(clock: Clock): void {
  now = () => {
    if (clock === 'wall') return performance.now();
    const { user, system } = process.cpuUsage();
    return (user + system) / 1000;
  };
}

export function milliseconds(work: () => void): number {
  const started = now();
  work();
  return now() - started;
}

/** One decode step of some way of storing keys and values. */
interface Contender {
  readonly bytes: number;
  readonly out: readonly Float32Array[];
  step(): void;
}

function dense(backend: Backend, workload: Workload, { tokens, batch }: Setting, half: boolean): Contender {
  const { shape, q } = workload;
  const out = new Float32Array(q.length);
  const items = Array.from({ length: batch }, () => ({
    ...shape,
    ...denseOf(workload, tokens, half),
    q,
    out,
  }));
  return {
    bytes: items.reduce((sum, { k, v }) => sum + k.byteLength + v.byteLength, 0),
    out: [out],
    step: () => items.forEach((item) => denseAttentionSync(backend, item)),
  };
}

interface Filled extends Contender {
  readonly scheme: string;
  readonly bitsPerValue: number;
  readonly appendTokensPerSecond: number;
  readonly bulkTokensPerSecond: number;
}

function filled(backend: Backend, workload: Workload, { tokens, batch }: Setting, name: string): Filled {
  const { shape, q, moments } = workload;
  const scheme = schemeNamed(name, moments);
  const options = { ...shape, layers: 1, scheme, windows: WINDOWS, rope: ROPE };
  const grown = { ...options, tokens: tokens + PERIOD, sequences: batch + 1 };
  const memory = Math.ceil(1.1 * KvCache.estimate(grown).totalBytes) + 2 ** 20; // zero points of hybrid schemes
  const cache = KvCache.createSync(backend, { ...options, memory });
  const row = shape.kvHeads * shape.headDim;
  const append = (sequence: Sequence, first: number, count: number) =>
    sequence.appendSync(
      0,
      workload.k.subarray(first * row, (first + count) * row),
      workload.v.subarray(first * row, (first + count) * row),
    );

  const bulk: number[] = [];
  const sequences = Array.from({ length: batch }, () => {
    const sequence = cache.sequence();
    for (let done = 0; done < tokens;) {
      const count = Math.min(PERIOD, tokens - done);
      const time = milliseconds(() => append(sequence, 0, count));
      bulk.push((1000 * count) / time);
      done += count;
    }
    return sequence;
  });
  const bytes = cache.stats().usedBytes;

  const single = Array.from({ length: 3 }, () => {
    using fork = sequences[0]!.forkSync();
    append(fork, 0, 1); // copies the page it shares
    const time = milliseconds(() => {
      for (let i = 1; i <= SINGLE_APPENDS; i++) append(fork, i, 1);
    });
    return (1000 * SINGLE_APPENDS) / time;
  });
  const items = sequences.map((sequence) => ({ sequence, q, out: new Float32Array(q.length) }));
  return {
    scheme: name,
    bitsPerValue: scheme.bitsPerValue(shape.headDim),
    bytes,
    out: items.map(({ out }) => out),
    appendTokensPerSecond: median(single),
    bulkTokensPerSecond: median(bulk),
    step: () => void cache.attendBatchSync(0, items),
  };
}

function relativeError(out: Float32Array, exact: Float32Array): number {
  let [error, size] = [0, 0];
  out.forEach((value, i) => {
    error += (value - exact[i]!) ** 2;
    size += exact[i]! ** 2;
  });
  return Math.sqrt(error / size);
}

/** Bytes the dense arrays of a setting take; the schemes stay below as much again for every three of them. */
export function denseBytes({ shape }: Workload, { tokens, batch }: Setting): number {
  return 2 * 6 * shape.kvHeads * shape.headDim * tokens * batch;
}

/**
 * Contenders run one after another in every round, so a disturbance of the machine meets them alike, and each finds its
 * memory as cold as a model's layer does: all the others' has been read since its own last turn.
 */
export async function measureCell(
  workload: Workload,
  setting: Setting,
  names: readonly string[],
  rounds: number,
  progress: (fraction: number, what: string) => void,
): Promise<Cell> {
  await using backend = await createBackend({
    backend: 'cpu',
    threads: setting.threads,
    ...(setting.isa !== '' && { isa: setting.isa }),
  });
  const steps = names.length + rounds;
  const breathe = () => new Promise(setImmediate); // lets Ctrl-C through
  const baselines = [dense(backend, workload, setting, false), dense(backend, workload, setting, true)];
  const stored: Filled[] = [];
  for (const name of names) {
    progress(stored.length / steps, `filling ${name}`);
    stored.push(filled(backend, workload, setting, name));
    await breathe();
  }

  const contenders = [...baselines, ...stored];
  const times = contenders.map(() => [] as number[]);
  for (const contender of contenders) contender.step();
  for (let round = 0; round < rounds; round++) {
    progress((names.length + round) / steps, 'attending');
    contenders.forEach((contender, i) => times[i]!.push(milliseconds(() => contender.step())));
    await breathe();
  }

  const timeOf = (i: number): AttendTime => {
    const typical = median(times[i]!);
    const { bytes } = contenders[i]!;
    return {
      attendMicroseconds: 1000 * typical,
      bytes,
      gigabytesPerSecond: bytes / (typical / 1000) / 1e9,
    };
  };
  const over = (baseline: number, i: number) =>
    median(times[i]!.map((time, round) => times[baseline]![round]! / time));
  return {
    ...setting,
    isa: backend.info.isa,
    rounds,
    fp32: timeOf(0),
    fp16: timeOf(1),
    schemes: stored.map(({ scheme, bitsPerValue, appendTokensPerSecond, bulkTokensPerSecond, out }, i) => ({
      scheme,
      bitsPerValue,
      ...timeOf(i + 2),
      overFp32: over(0, i + 2),
      overFp16: over(1, i + 2),
      appendTokensPerSecond,
      bulkTokensPerSecond,
      relativeError: relativeError(out[0]!, baselines[0]!.out[0]!),
    })),
  };
}

export interface Overhead {
  readonly threads: number;
  /** Medians of calls on a sequence of one token: what a call costs before it has work. */
  readonly attendSyncMicroseconds: number;
  readonly attendAsyncMicroseconds: number;
  readonly appendSyncMicroseconds: number;
}

export async function measureOverhead({ shape, q, k, v }: Workload, threads: number): Promise<Overhead> {
  await using backend = await createBackend({ backend: 'cpu', threads });
  const options = { ...shape, layers: 1, scheme: schemeNamed('fp16'), windows: { sink: 4096, recent: 0 } };
  using cache = KvCache.createSync(backend, { ...options, memory: '256MiB' });
  using sequence = cache.sequence();
  const row = shape.kvHeads * shape.headDim;
  const [key, value] = [k.subarray(0, row), v.subarray(0, row)];
  const out = new Float32Array(q.length);
  sequence.appendSync(0, key, value);
  const sync: number[] = [];
  const later: number[] = [];
  const append: number[] = [];
  for (let i = 0; i < 2000; i++) sync.push(milliseconds(() => sequence.attendSync(0, q, { out })));
  for (let i = 0; i < 2000; i++) {
    const started = performance.now();
    await sequence.attend(0, q, { out });
    later.push(performance.now() - started);
  }
  for (let i = 0; i < 2000; i++) append.push(milliseconds(() => sequence.appendSync(0, key, value)));
  return {
    threads,
    attendSyncMicroseconds: 1000 * median(sync),
    attendAsyncMicroseconds: 1000 * median(later),
    appendSyncMicroseconds: 1000 * median(append),
  };
}
