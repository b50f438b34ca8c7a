/** Four whole layers of a real model over 2,048 tokens: what each scheme costs the output, calibrated on another text. */
import {
  createBackendSync,
  denseAttentionSync,
  KvCache,
  schemes,
  type Backend,
  type Scheme,
} from '../../lib';
import { describeWith, MOMENTS, readRecorded, RECORDING, type Recorded } from '../support/recorded';

/** Queries compared: every STEP-th token from FIRST on, each against all tokens before it. */
const FIRST = 512;
const STEP = 96;

/** [tokens, heads, dim] -> [heads, tokens, dim]. */
function byHead(x: Float32Array, heads: number, dim: number): Float32Array {
  const tokens = x.length / (heads * dim);
  const out = new Float32Array(x.length);
  for (let t = 0; t < tokens; t++)
    for (let h = 0; h < heads; h++)
      out.set(x.subarray((t * heads + h) * dim, (t * heads + h + 1) * dim), (h * tokens + t) * dim);
  return out;
}

describeWith([RECORDING, MOMENTS], 'recorded activations', () => {
  let backend: Backend;
  afterAll(() => backend.dispose());
  let recorded: Recorded;
  let exact: Map<number, Float32Array>[];
  const row = (x: Float32Array, token: number, heads: number, count = 1) =>
    x.subarray(token * heads * 64, (token + count) * heads * 64);
  const compared: number[] = [];

  beforeAll(() => {
    backend = createBackendSync({ threads: 2 });
    recorded = readRecorded();
    const { queryHeads, kvHeads, headDim } = recorded.shape;
    for (let token = FIRST; token < recorded.tokens; token += STEP) compared.push(token);
    exact = recorded.layers.map(
      ({ q, k, v }) =>
        new Map(
          compared.map((token) => [
            token,
            denseAttentionSync(backend, {
              queryHeads,
              kvHeads,
              headDim,
              k: byHead(row(k, 0, kvHeads, token + 1), kvHeads, headDim),
              v: byHead(row(v, 0, kvHeads, token + 1), kvHeads, headDim),
              q: row(q, token, queryHeads),
            }),
          ]),
        ),
    );
  });

  /** Mean over layers of the error's rms over the output's. Tokens come in runs between the compared queries. */
  function outputError(scheme: Scheme): number {
    const { shape, layers } = recorded;
    using cache = KvCache.createSync(backend, { ...shape, scheme, memory: '64MiB' });
    const sequence = cache.sequence();
    const errors = layers.map(({ q, k, v }, layer) => {
      let [error, energy, held] = [0, 0, 0];
      for (const token of compared) {
        const count = token + 1 - held;
        sequence.appendSync(layer, row(k, held, shape.kvHeads, count), row(v, held, shape.kvHeads, count));
        held = token + 1;
        const out = sequence.attendSync(layer, row(q, token, shape.queryHeads));
        const truth = exact[layer]!.get(token)!;
        truth.forEach((value, i) => {
          error += (out[i]! - value) ** 2;
          energy += value ** 2;
        });
      }
      return Math.sqrt(error / energy);
    });
    return errors.reduce((sum, value) => sum + value, 0) / errors.length;
  }

  test('output errors are in the order of their bits and of what is known about the model', () => {
    const bits = (keyBits: 2 | 3 | 4, valueBits: 1 | 2 | 3 | 4) => ({ keyBits, valueBits });
    const calibrated = (k: 2 | 3 | 4, v: 1 | 2 | 3 | 4) =>
      outputError(schemes.calibrated(recorded.moments, bits(k, v)));
    const rotated = (k: 2 | 3 | 4, v: 2 | 3 | 4) => outputError(schemes.rotated(bits(k, v)));
    const errors = {
      fp16: outputError(schemes.fp16()),
      q8: outputError(schemes.q8()),
      calibrated44: calibrated(4, 4),
      calibrated33: calibrated(3, 3),
      calibrated32: calibrated(3, 2),
      calibrated22: calibrated(2, 2),
      calibrated21: calibrated(2, 1),
      rotated44: rotated(4, 4),
      rotated33: rotated(3, 3),
      rotated22: rotated(2, 2),
      innerqBase: outputError(schemes.innerq({ preset: 'base' })),
      innerqHybrid: outputError(schemes.innerq({ preset: 'hybrid' })),
    };
    if (process.env.INNERKV_PRINT) process.stderr.write(`${JSON.stringify(errors, null, 1)}\n`);
    const ordered = (...names: (keyof typeof errors)[]) => {
      const values = names.map((name) => errors[name]);
      expect(values).toEqual([...values].sort((a, b) => a - b));
    };
    expect(errors.fp16).toBeLessThan(2 ** -20); // the recording is binary16
    ordered('fp16', 'q8', 'calibrated44', 'calibrated33', 'calibrated32', 'calibrated22', 'calibrated21');
    ordered('q8', 'rotated44', 'rotated33', 'rotated22');
    for (const width of [44, 33, 22] as const) ordered(`calibrated${width}`, `rotated${width}`);
    ordered('calibrated32', 'innerqHybrid'); // 2.75 bits against 3.0
    ordered('calibrated33', 'innerqBase'); // 3.25 bits against 3.5
  });

  test('a sequence of the model comes back from its saved form bit for bit', () => {
    const scheme = schemes.calibrated(recorded.moments, { keyBits: 2, valueBits: 2 });
    using cache = KvCache.createSync(backend, { ...recorded.shape, scheme, memory: '64MiB' });
    const sequence = cache.sequence();
    recorded.layers.forEach(({ k, v }, layer) => sequence.appendSync(layer, k, v));
    const bytes = sequence.saveSync();
    const copy = cache.loadSync(bytes);
    expect(Buffer.compare(copy.saveSync(), bytes)).toBe(0);
    const q = row(recorded.layers[3]!.q, recorded.tokens - 1, recorded.shape.queryHeads);
    expect(copy.attendSync(3, q)).toEqual(sequence.attendSync(3, q));
  });
});
