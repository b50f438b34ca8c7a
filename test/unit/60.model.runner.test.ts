import { readFileSync, writeFileSync } from 'node:fs';
import { KvCache, schemes, type ErrorCode, type Sequence } from '../../lib';
import { Model, type ModelConfig, type TensorType } from '../../lib/model';
import { MOST, ReferenceLlama, type Observed, type Tracked } from '../reference/llama';
import { failure } from '../support/failures';
import { modelConfig, randomModel, removeModels, type RandomModel } from '../support/model';
import { backendOf, disposeBackends, isas } from '../support/native';
import { Random } from '../support/random';

// Forward passes of small random models against the float64 reference, within the deviations that it derives.

afterAll(disposeBackends);
afterAll(removeModels);

const fp16 = { scheme: schemes.fp16(), memory: '64MiB', windows: { sink: 4, recent: 8 } };
const packed = { ...fp16, scheme: schemes.rotated({ keyBits: 4, valueBits: 4 }) };

function tokensOf(model: RandomModel, count: number, seed = 7): number[] {
  const random = new Random(seed);
  return Array.from({ length: count }, () => random.below(model.config.vocabulary));
}

function opened(model: RandomModel, isa = '', threads = 2): Model {
  return Model.openSync(backendOf(isa, threads), model);
}

/** Logits of every token by the reference. */
function expected(model: RandomModel, tokens: readonly number[], int8 = false): Tracked[] {
  const reference = new ReferenceLlama(model.shape, (name) => model.tensor(name), int8);
  return tokens.map((token) => reference.next(token));
}

function rows(logits: Float32Array, vocabulary: number): Float32Array[] {
  return Array.from({ length: logits.length / vocabulary }, (_, i) =>
    logits.subarray(i * vocabulary, (i + 1) * vocabulary),
  );
}

/** The largest difference in standard deviations; at most MOST is right. */
function worst(actual: readonly Float32Array[], reference: readonly Tracked[]): number {
  expect(actual.length).toBe(reference.length);
  const ratios = reference.flatMap(({ v, e }, t) =>
    Array.from(v, (x, i) => Math.abs(actual[t]![i]! - x) / e[i]!),
  );
  expect(ratios.every(Number.isFinite)).toBe(true);
  return Math.max(...ratios);
}

/** How much of the logits the tolerance leaves open. A vacuous one would prove nothing. */
function looseness(reference: readonly Tracked[]): number {
  const rms = (values: number[]) => Math.sqrt(values.reduce((a, b) => a + b * b, 0) / values.length);
  return (MOST * rms(reference.flatMap(({ e }) => [...e]))) / rms(reference.flatMap(({ v }) => [...v]));
}

const shapes: [string, Partial<ModelConfig>, TensorType][] = [
  [
    'Llama: GQA, adjacent pairs, a feed-forward width that is no multiple of 16',
    { intermediate: 172 },
    'F32',
  ],
  [
    'Qwen2: biases, tied head, halves',
    {
      architecture: 'qwen2',
      attentionBias: true,
      tiedHead: true,
      rope: { base: 1e6, layout: 'half' },
      kvHeads: 1,
    },
    'F16',
  ],
  ['Qwen3: head norms', { architecture: 'qwen3', qkNorm: true, rope: { base: 1e6, layout: 'half' } }, 'BF16'],
  ['Mistral: sliding window', { slidingWindow: 5 }, 'F32'],
  [
    'Llama 3: scaled RoPE, heads of a size that caches pad',
    {
      headDim: 24,
      rope: {
        base: 500000,
        layout: 'adjacent',
        scaling: { type: 'llama3', factor: 8, lowFreqFactor: 1, highFreqFactor: 4, originalContext: 64 },
      },
    },
    'F32',
  ],
  ...(['Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1'] as const).map(
    (type): [string, Partial<ModelConfig>, TensorType] => [type, {}, type],
  ),
  ...(['Q4_K', 'Q6_K'] as const).map((type): [string, Partial<ModelConfig>, TensorType] => [
    type,
    { hidden: 256, intermediate: 256 },
    type,
  ]),
  ['BitNet: ternary weights, norms before every product', { bareNorms: true }, 'TERNARY'],
];

const quantised = (type: TensorType) => type.startsWith('Q') || type === 'TERNARY';

describe.each(shapes)('%s', (_, changes, type) => {
  const model = randomModel(modelConfig(changes), type);
  const tokens = tokensOf(model, 11);
  const { vocabulary } = model.config;

  test.each(isas())('float32 activations, prefill on %s', (isa) => {
    using native = opened(model, isa);
    using cache = native.createCacheSync(fp16);
    const logits = native.forwardSync(cache.sequence(), tokens, { logits: 'all', activations: 'float32' });
    const reference = expected(model, tokens);
    expect(looseness(reference)).toBeLessThan(0.05);
    expect(worst(rows(logits, vocabulary), reference)).toBeLessThanOrEqual(MOST);
  });

  if (quantised(type))
    test.each(isas())('8-bit activations, token by token and prefill on %s', (isa) => {
      using native = opened(model, isa);
      using cache = native.createCacheSync(fp16);
      const sequence = cache.sequence();
      const logits = tokens.map((token) => native.forwardSync(sequence, [token], { activations: 'int8' }));
      const all = native.forwardSync(cache.sequence(), tokens, { activations: 'int8', logits: 'all' });
      for (const found of [logits, rows(all, vocabulary)])
        expect(worst(found, expected(model, tokens, true))).toBeLessThanOrEqual(MOST);
    });
});

describe('the same numbers in other ways', () => {
  const model = randomModel(modelConfig(), 'Q4_1');
  const tokens = tokensOf(model, 60);
  const float32 = { activations: 'float32' } as const;

  test.each([
    ['fp16', fp16],
    ['packed', packed],
  ])('%s: a prefill in steps of 1 is decoding, bit by bit', (_, options) => {
    using native = opened(model);
    using cache = native.createCacheSync(options);
    const [prefill, decode] = [cache.sequence(), cache.sequence()];
    const logits = native.forwardSync(prefill, tokens, { ...float32, step: 1, chunk: 37, logits: 'all' });
    const single = tokens.map((token) => native.forwardSync(decode, [token], float32));
    expect(rows(logits, 40)).toEqual(single);
    expect(prefill.saveSync()).toEqual(decode.saveSync());
  });

  test('a prefill in one step keeps the tolerance of decoding', () => {
    using native = opened(model);
    using cache = native.createCacheSync(fp16);
    const logits = native.forwardSync(cache.sequence(), tokens, { ...float32, logits: 'all' });
    expect(worst(rows(logits, 40), expected(model, tokens))).toBeLessThanOrEqual(MOST);
  });

  test.each(['int8', 'float32'] as const)('%s: a batch is its sequences one by one', async (activations) => {
    using native = opened(model);
    using cache = native.createCacheSync(packed);
    const lengths = [1, 17, 5, 40];
    const single = lengths.map(() => cache.sequence());
    const batched = lengths.map(() => cache.sequence());
    const pass = (sequences: Sequence[], counts: number[], at: number) =>
      sequences.map((sequence, i) => ({ sequence, tokens: tokens.slice(at, at + counts[i]!) }));
    for (const item of pass(single, lengths, 0)) native.forwardSync(item.sequence, item.tokens, float32);
    await native.forwardBatch(pass(batched, lengths, 0), { ...float32, chunk: 64 });
    const one = pass(single, [1, 1, 1, 1], 41).map(({ sequence, tokens: next }) =>
      native.forwardSync(sequence, next, { activations }),
    );
    const all = await native.forwardBatch(pass(batched, [1, 1, 1, 1], 41), { activations });
    expect(all).toEqual(one);
    expect(batched.map((sequence) => sequence.length(1))).toEqual(lengths.map((length) => length + 1));
  });

  test('losses are those of the logits, of the next token or of given targets', async () => {
    using native = opened(model);
    using cache = native.createCacheSync(fp16);
    const logits = rows(native.forwardSync(cache.sequence(), tokens, { ...float32, logits: 'all' }), 40);
    const loss = (row: Float32Array, target: number) =>
      Math.log(row.reduce((a, x) => a + Math.exp(x - row[target]!), 0));
    const following = tokens.map((_, i) => tokens[i + 1] ?? -1);
    const sparse = following.map((target, i) => (i % 3 ? -1 : target));
    for (const targets of [undefined, sparse]) {
      const nll = await native.nll(cache.sequence(), tokens, { ...float32, ...(targets && { targets }) });
      (targets ?? following).forEach((target, i) =>
        // Exponentials of 2 ulp, a float32 sum of 16 and of lanes, and the rounding of the result.
        expect(Math.abs(nll[i]! - (target < 0 ? 0 : loss(logits[i]!, target)))).toBeLessThan(
          64 * 2 ** -24 * 8,
        ),
      );
    }
  });

  test('moments are those of the reference', async () => {
    const observed: Observed[] = [];
    const reference = new ReferenceLlama(
      model.shape,
      (name) => model.tensor(name),
      false,
      (o) => observed.push(o),
    );
    tokens.forEach((token) => reference.next(token));
    using native = opened(model);
    using cache = native.createCacheSync(fp16);
    using recorder = native.moments({ skip: 4 });
    const sequence = cache.sequence();
    await native.forward(sequence, tokens.slice(0, 3), { ...float32, observe: recorder, logits: 'none' });
    expect(() => recorder.readSync()).toThrow(failure('ERR_INNERKV_INVALID_ARGUMENT', 'observed'));
    await native.forward(sequence, tokens.slice(3), {
      ...float32,
      observe: recorder,
      logits: 'none',
      chunk: 16,
    });
    const moments = await recorder.read();
    expect(moments.tokens).toBe(56);
    for (const [layer, heads] of moments.layers)
      for (const [head, { keyMean, keyMoment, queryMoment }] of heads.entries()) {
        const all = observed.filter((o) => o.layer === layer);
        const key = (o: Observed, c: number) => o.k[head * 64 + c]!;
        const mean = (value: (o: Observed) => number, counted = all.slice(4)) =>
          counted.reduce((a, o) => a + value(o), 0) / counted.length;
        const close = (actual: number, exact: number) => expect(Math.abs(actual - exact)).toBeLessThan(0.01);
        for (const [c, d] of [
          [0, 0],
          [3, 60],
          [17, 18],
        ] as const) {
          // prettier-ignore
          close(keyMean[c]!, mean((o) => key(o, c)));
          close(
            keyMoment[c * 64 + d]!,
            mean((o) => key(o, c) * key(o, d)),
          );
          const query = (o: Observed, g: number) =>
            o.q[(2 * head + g) * 64 + c]! * o.q[(2 * head + g) * 64 + d]!;
          close(
            queryMoment[c * 64 + d]!,
            mean((o) => (query(o, 0) + query(o, 1)) / 2, all),
          );
        }
      }
  });
});

describe('a forward pass that fails changes nothing', () => {
  const model = randomModel(modelConfig(), 'F32');
  const tokens = tokensOf(model, 300);
  const grouped = { ...fp16, scheme: schemes.innerq({ keyBits: 3, valueBits: 3 }) };

  test.each([
    ['rotated', packed],
    ['values in groups of 32 tokens', grouped],
    ['fp16', fp16],
  ])('%s: budget', async (_, options) => {
    using native = opened(model);
    using roomy = native.createCacheSync(options);
    const grown = roomy.sequence();
    native.forwardSync(grown, tokens.slice(0, 150), { logits: 'none' });
    const { usedBytes } = roomy.stats();
    using larger = roomy.sequence();
    native.forwardSync(larger, tokens, { logits: 'none' });
    // Enough for more than the first layer and for less than both.
    const memory = usedBytes + 0.75 * (roomy.stats().usedBytes - 2 * usedBytes);
    using tight = native.createCacheSync({ ...options, memory: Math.floor(memory) });
    const sequence = tight.sequence();
    native.forwardSync(sequence, tokens.slice(0, 150), { logits: 'none' });
    await expect(native.forward(sequence, tokens.slice(150))).rejects.toThrow(
      failure('ERR_INNERKV_OUT_OF_MEMORY'),
    );
    expect([0, 1].map((layer) => sequence.length(layer))).toEqual([150, 150]);
    expect(tight.stats().usedBytes).toBe(usedBytes);
    expect(contents(sequence)).toEqual(contents(grown));
    // What comes after is what would have come.
    const next = (at: Sequence) => native.forwardSync(at, [tokens[150]!], { activations: 'float32' });
    expect(next(sequence)).toEqual(next(grown));
  });

  test('a model whose keys leave binary16, in the second layer', () => {
    const wild = randomModel(modelConfig(), 'F32', 3);
    const broken = new Map(wild.tensors).set('layers.1.k', {
      ...wild.tensors.get('layers.1.k')!,
      ...keysOf(wild.config, 1e6),
    });
    using native = Model.openSync(backendOf(), { config: wild.config, tensors: broken });
    using cache = native.createCacheSync(fp16);
    const sequence = cache.sequence();
    expect(() => native.forwardSync(sequence, [1, 2, 3])).toThrow(
      failure('ERR_INNERKV_NOT_FINITE', 'Layer 1'),
    );
    expect([sequence.length(0), sequence.length(1), cache.stats().usedBytes]).toEqual([0, 0, 0]);
  });

  test('an aborted one rejects with the reason', async () => {
    using native = opened(model);
    using cache = native.createCacheSync(packed);
    const sequence = cache.sequence();
    await native.forward(sequence, tokens.slice(0, 20));
    const before = contents(sequence);
    const controller = new AbortController();
    const running = native.forward(sequence, tokens.slice(20), {
      signal: controller.signal,
      step: 1,
      chunk: 1,
    });
    setTimeout(() => controller.abort(new Error('enough')), 5);
    await expect(running).rejects.toThrow('enough');
    expect(contents(sequence)).toEqual(before);
    expect(sequence.length()).toBe(20);
  });
});

/** Where a file has other keys of the second layer, of this size. */
function keysOf(config: ModelConfig, value: number) {
  const { path, tensors } = randomModel(config, 'F32', 4);
  const { offset, bytes } = tensors.get('layers.1.k')!;
  const file = readFileSync(path);
  for (let i = 0; i < bytes / 4; i++) file.writeFloatLE(value * (1 + (i % config.hidden)), offset + 4 * i);
  writeFileSync(path, file);
  return { path, offset };
}

/** Everything stored, decoded: [layer][head]. */
function contents(sequence: Sequence) {
  return [0, 1].map((layer) => [0, 1].map((head) => sequence.readBackSync(layer, head)));
}

describe('bad input', () => {
  const model = randomModel(modelConfig(), 'Q8_0');
  const code = 'ERR_INNERKV_INVALID_ARGUMENT';

  test('tokens, options, sequences', () => {
    using native = opened(model);
    using cache = native.createCacheSync(fp16);
    const sequence = cache.sequence();
    const refused = (text: string, tokens: number[], options = {}, on = sequence) =>
      expect(() => native.forwardSync(on, tokens, options)).toThrow(failure(code, text));
    refused('at least one token', []);
    refused('token must be', [40]);
    refused('token must be', [-1]);
    refused('token must be', [1.5]);
    refused('context', new Array<number>(513).fill(1));
    refused('chunk', [1], { chunk: 0 });
    refused('step', [1], { step: 0 });
    refused('logits', [1], { logits: 'some' });
    refused('activations', [1], { activations: 'fp4' });
    expect(() => native.nllSync(sequence, [1, 2], { targets: [1] })).toThrow(failure(code, 'targets'));
    expect(() => native.nllSync(sequence, [1], { targets: [40] })).toThrow(failure(code, 'target must be'));
    const item = { sequence, tokens: [1] };
    expect(() => native.forwardBatchSync([item, item])).toThrow(failure(code, 'twice'));
    expect(() => native.forwardBatchSync([])).toThrow(failure(code, 'at least one'));
    using other = native.createCacheSync(fp16);
    expect(() => native.forwardBatchSync([item, { sequence: other.sequence(), tokens: [1] }])).toThrow(
      failure(code, 'another cache'),
    );
    using foreign = Model.openSync(backendOf('', 1), model).createCacheSync(fp16);
    refused('another backend', [1], {}, foreign.sequence());
    sequence.appendSync(0, new Float32Array(128), new Float32Array(128));
    refused('different numbers of tokens', [1]);
    sequence.dispose();
    expect(() => native.forwardSync(sequence, [1])).toThrow(failure('ERR_INNERKV_DISPOSED'));
    native.dispose();
    expect(() => native.forwardSync(cache.sequence(), [1])).toThrow(failure('ERR_INNERKV_DISPOSED', 'model'));
  });

  test('a cache of another shape or with other RoPE', () => {
    using native = opened(model);
    const shape = { ...native.cacheShape(), ...fp16 };
    for (const [changes, text] of [
      [{ layers: 3 }, 'shape'],
      [{ rope: { base: 20000, layout: 'adjacent' as const } }, 'RoPE'],
      [{ rope: { base: 10000, layout: 'half' as const } }, 'RoPE'],
    ] as const) {
      using cache = KvCache.createSync(native.backend, { ...shape, ...changes });
      expect(() => native.forwardSync(cache.sequence(), [1])).toThrow(failure(code, text));
    }
  });

  test('tensors that are missing, too many, misplaced or of the wrong size', () => {
    const refused = (
      text: string,
      change: (tensors: RandomModel['tensors']) => void,
      expectedCode: ErrorCode = code,
    ) => {
      const tensors = new Map(model.tensors);
      change(tensors);
      expect(() => Model.openSync(backendOf(), { config: model.config, tensors })).toThrow(
        failure(expectedCode, text),
      );
    };
    const edit =
      (name: 'head' | 'norm' | 'layers.1.q', changes: object) => (tensors: RandomModel['tensors']) =>
        void tensors.set(name, { ...tensors.get(name)!, ...changes });
    refused("lacks tensor 'norm'", (tensors) => void tensors.delete('norm'));
    refused('no place for', (tensors) => void tensors.set('layers.2.q', tensors.get('layers.1.q')!));
    refused('instead of [40, 96]', edit('head', { shape: [96, 40] }));
    refused('instead of [40, 96]', edit('head', { shape: [] }));
    refused('needs', edit('head', { bytes: 7 }));
    refused('needs', edit('head', { type: 'Q4_0' }));
    refused('outside its file', edit('head', { offset: 2 ** 40 }));
    refused('outside its file', edit('head', { bytes: 2 ** 52 }));
    refused('from 0 to 2^53', edit('head', { offset: -1 }));
    refused('from 0 to 2^53', edit('head', { offset: 0.5 }));
    refused('cannot be opened', edit('norm', { path: `${model.path}.absent` }));
    refused('no kernels for', edit('norm', { type: 'IQ1_S' }), 'ERR_INNERKV_UNSUPPORTED');
  });
});
