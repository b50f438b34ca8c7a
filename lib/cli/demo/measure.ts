/** One scheme over the recording, token by token through the public API: fidelity, size, time. */
import { type Backend } from '../../backend';
import { KvCache } from '../../cache';
import { binding } from '../../binding';
import { denseAttentionSync } from '../../backend';
import { type DescribedScheme, type Windows } from '../../schemes';
import { type Sequence } from '../../sequence';
import { FidelityMeter, type ExactLayer, type Fidelity } from './exact';
import { type RecordedLayer, type Recording } from './recording';

export interface Run {
  readonly backend: Backend;
  readonly recording: Recording;
  readonly exact: readonly ExactLayer[];
  /** First query that is compared and timed. */
  readonly first: number;
  readonly windows: Windows;
}

export interface SchemeResult extends Fidelity {
  readonly scheme: string;
  readonly description: string;
  /** Codes, scales and zero points per number, without windows. */
  readonly bitsPerValue: number;
  /** Everything the sequence holds, per number, and the same for 32,768 tokens. */
  readonly bitsPerValueNow: number;
  readonly bitsPerValueAt32K: number;
  readonly usedBytes: number;
  /** Bytes of the same tokens in 16 bits over usedBytes. */
  readonly saving: number;
  /** Median per token and layer, queries `first` and later. */
  readonly appendMicroseconds: number;
  readonly attendMicroseconds: number;
}

export interface DenseResult {
  readonly fp16Bytes: number;
  readonly fp32Microseconds: number;
  readonly fp16Microseconds: number;
}

function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)]!;
}

function microseconds(work: () => void): number {
  const started = performance.now();
  work();
  return 1000 * (performance.now() - started);
}

/** Numbers of keys and values of the whole recording. */
function numbersOf({ shape, tokens }: Recording): number {
  return 2 * shape.layers * shape.kvHeads * shape.headDim * tokens;
}

export async function measureScheme(
  { backend, recording, exact, first, windows }: Run,
  scheme: DescribedScheme,
  progress: (fraction: number) => void,
): Promise<SchemeResult> {
  const { shape, tokens, layers } = recording;
  const { queryHeads, kvHeads, headDim } = shape;
  const options = { ...shape, scheme, windows };
  using cache = await KvCache.create(backend, { ...options, memory: '64MiB' });
  using sequence = cache.sequence();
  const meter = new FidelityMeter(recording, exact, first);
  const out = new Float32Array(queryHeads * headDim);
  const appends: number[] = [];
  const attends: number[] = [];
  for (let token = 0; token < tokens; token++) {
    const compared = token >= first;
    const row = (array: Float32Array, heads: number) =>
      array.subarray(token * heads * headDim, (token + 1) * heads * headDim);
    layers.forEach(({ k, v, q }, layer) => {
      const query = row(q, queryHeads);
      const append = microseconds(() => sequence.appendSync(layer, row(k, kvHeads), row(v, kvHeads)));
      const attend = microseconds(() => sequence.attendSync(layer, query, { out }));
      if (!compared) return;
      appends.push(append);
      attends.push(attend);
      // A second time for the logits: writing them is no part of what a model waits for.
      const logits = new Float32Array(queryHeads * (token + 1));
      sequence.attendSync(layer, query, { out, logits });
      meter.add(layer, token, out, logits);
    });
    if (token % 64 === 63) {
      progress((token + 1) / tokens);
      await new Promise(setImmediate); // lets Ctrl-C through
    }
  }

  const numbers = numbersOf(recording);
  const zeroBits = zeroPointBits(sequence, recording);
  const { usedBytes } = cache.stats();
  const fp16Bytes = 2 * numbers;
  const at32K = KvCache.estimate({ ...options, tokens: 32768 });
  return {
    scheme: scheme.name,
    description: scheme.describe(),
    ...meter.result(),
    bitsPerValue: scheme.bitsPerValue(headDim) + zeroBits,
    bitsPerValueNow: (8 * usedBytes) / numbers,
    bitsPerValueAt32K: (8 * at32K.totalBytes) / (numbers / tokens) / 32768 + zeroBits,
    usedBytes,
    saving: fp16Bytes / usedBytes,
    appendMicroseconds: median(appends),
    attendMicroseconds: median(attends),
  };
}

/** The same queries over plain keys and values, float32 and binary16. */
export function measureDense({ backend, recording, first }: Run): DenseResult {
  const { shape, tokens, layers } = recording;
  const { queryHeads, kvHeads, headDim } = shape;
  const out = new Float32Array(queryHeads * headDim);
  const measure = (layer: RecordedLayer, k: Float32Array | Uint16Array, v: Float32Array | Uint16Array) =>
    Array.from({ length: tokens - first }, (_, i) => {
      const token = first + i;
      const end = (token + 1) * headDim; // there is one KV head, so the first tokens are one piece of memory
      const q = layer.q.subarray(token * queryHeads * headDim, (token + 1) * queryHeads * headDim);
      const call = { k: k.subarray(0, end), v: v.subarray(0, end), q, queryHeads, kvHeads, headDim, out };
      return microseconds(() => denseAttentionSync(backend, call));
    });
  return {
    fp16Bytes: 2 * numbersOf(recording),
    fp32Microseconds: median(layers.flatMap((layer) => measure(layer, layer.k, layer.v))),
    fp16Microseconds: median(layers.flatMap((layer) => measure(layer, layer.kHalf, layer.vHalf))),
  };
}

/** Bits per quantised number of zero points whose count depends on the data. */
function zeroPointBits(sequence: Sequence, { shape }: Recording): number {
  let [zeros, numbers] = [0, 0];
  for (let layer = 0; layer < shape.layers; layer++) {
    const { keysQuantised, valuesQuantised } = sequence.layerState(layer);
    numbers += (keysQuantised + valuesQuantised) * shape.kvHeads * shape.headDim;
    for (let head = 0; head < shape.kvHeads; head++)
      for (let page = 0; page * binding().pageTokens < Math.max(keysQuantised, valuesQuantised); page++) {
        const stored = sequence.pageBytes(layer, head, page);
        if (stored) zeros += stored.keyZeros.length + stored.valueZeros.length;
      }
  }
  return numbers === 0 ? 0 : (16 * zeros) / numbers;
}
