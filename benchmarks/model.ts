/**
 * Speed of a model over a cache: prefill and decoding in tokens per second, beside the naive bound of decoding, which is the
 * rate of memcpy over the bytes of weights that a token reads. Usage: ts-node benchmarks/model.ts MODEL [threads] [--json]
 */
import { createBackendSync, schemes } from '../lib';
import { Model } from '../lib/model';

const [path, threadCount = '2'] = process.argv.slice(2).filter((argument) => !argument.startsWith('--'));
if (path === undefined) throw new Error('Usage: ts-node benchmarks/model.ts MODEL [threads] [--json]');

const PROMPT = 512;
const STEPS = 48;
const ROUNDS = 5;

function median(values: number[]): number {
  return values.sort((a, b) => a - b)[values.length >> 1]!;
}

function seconds(work: () => void): number {
  const start = process.hrtime.bigint();
  work();
  return Number(process.hrtime.bigint() - start) / 1e9;
}

/** Bytes per second of one thread that copies much more than the caches hold. */
function copyRate(): number {
  const [from, to] = [Buffer.alloc(2 ** 28, 1), Buffer.alloc(2 ** 28, 2)];
  return median(Array.from({ length: ROUNDS }, () => from.length / seconds(() => void from.copy(to))));
}

const threads = Number(threadCount);
using backend = createBackendSync({ backend: 'cpu', threads });
using model = Model.openSync(backend, path);
using cache = model.createCacheSync({ scheme: schemes.fp16(), memory: '4GiB' });
const tokens = Array.from({ length: PROMPT }, (_, i) => (i * 7919) % model.config.vocabulary);

function rate(count: number, activations: 'int8' | 'float32', batch: number, step: (i: number) => number[]) {
  const rounds = Array.from({ length: ROUNDS }, () => {
    const sequences = Array.from({ length: batch }, () => cache.sequence());
    const time = seconds(() => {
      for (let i = 0; i < count; i++) {
        const items = sequences.map((sequence) => ({ sequence, tokens: step(i), logits: 'last' as const }));
        model.forwardBatchSync(items, { activations });
      }
    });
    sequences.forEach((sequence) => sequence.dispose());
    return (count * batch * step(0).length) / time;
  });
  return median(rounds);
}

const copy = copyRate();
const bound = copy / model.bytesPerToken;
const one = (i: number) => [tokens[i]!];
const rows = [
  { what: `prefill of ${PROMPT}, float32`, tokensPerSecond: rate(1, 'float32', 1, () => tokens) },
  { what: 'decode, int8', tokensPerSecond: rate(STEPS, 'int8', 1, one) },
  { what: 'decode, float32', tokensPerSecond: rate(STEPS, 'float32', 1, one) },
  { what: 'decode of 4 sequences, int8', tokensPerSecond: rate(STEPS, 'int8', 4, one) },
  { what: 'decode of 16 sequences, int8', tokensPerSecond: rate(STEPS, 'int8', 16, one) },
];
const { isa } = backend.info;
const facts = {
  isa,
  threads,
  bytesPerToken: model.bytesPerToken,
  copyBytesPerSecond: copy,
  boundTokensPerSecond: bound,
};
if (process.argv.includes('--json')) console.log(JSON.stringify({ ...facts, rows }, undefined, 2));
else {
  console.log(
    `${isa}, ${threads} threads; memcpy ${(copy / 1e9).toFixed(1)} GB/s on one thread over ` +
      `${(model.bytesPerToken / 1e6).toFixed(1)} MB of weights: ${bound.toFixed(0)} tokens/s`,
  );
  for (const { what, tokensPerSecond } of rows)
    console.log(
      `${what.padEnd(30)} ${tokensPerSecond.toFixed(1).padStart(8)} tokens/s, ${(tokensPerSecond / bound).toFixed(2)} of the bound`,
    );
}
