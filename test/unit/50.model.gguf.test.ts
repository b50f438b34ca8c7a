/** The GGUF reader on files made here: right ones, wrong ones in every way, and mutations of a right one. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { KvError } from '../../lib/errors';
import { openModel } from '../../lib/model';
import { memorySource } from '../../lib/model/bytes';
import { parseGguf } from '../../lib/model/gguf';
import { ggufModel } from '../../lib/model/gguf-model';
import { ggufTokenizer } from '../../lib/model/vocabulary';
import { blocks } from '../reference/dequantise';
import { failure } from '../support/failures';
import {
  tensor,
  tinyGguf,
  tinyMetadata,
  tinyTensors,
  tinyTokens,
  typeNumbers,
  writeGguf,
} from '../support/gguf';
import { type Entry, type GgufParts, type ValueType, type WrittenTensor } from '../support/gguf';
import { Random } from '../support/random';

const open = (bytes: Uint8Array) => {
  const source = memorySource(bytes);
  return ggufModel(parseGguf(source), source);
};
const corrupt = (text: string) => failure('ERR_INNERKV_CORRUPT', text);
const unsupported = (text: string) => failure('ERR_INNERKV_UNSUPPORTED', text);

describe('what is right', () => {
  test('a model: configuration and tensors', () => {
    const { config, tensors } = open(tinyGguf());
    expect(config).toEqual({
      ...{ architecture: 'llama', layers: 2, hidden: 32, intermediate: 64, queryHeads: 2, kvHeads: 1 },
      ...{ headDim: 16, vocabulary: tinyTokens.length, contextLength: 128, rmsEpsilon: Math.fround(1e-5) },
      rope: { base: 50000, layout: 'adjacent' },
      ...{ qkNorm: false, attentionBias: false, tiedHead: true, bos: 1, eos: [2, 0] },
    });
    expect(tensors.size).toBe(2 + 2 * 9);
    expect(tensors.get('layers.1.down')).toMatchObject({ type: 'Q8_0', shape: [32, 64], bytes: 64 * 34 });
  });

  test('every tensor lies where its bytes are', () => {
    const random = new Random(3);
    const written = tinyTensors(random);
    for (const alignment of [8, 32, 256]) {
      const entry: Entry = ['general.alignment', 'u32', alignment];
      const bytes = tinyGguf({ 'general.alignment': entry }, () => written, { alignment });
      const { tensors } = open(bytes);
      expect([...tensors.values()].map(({ name }) => name)).toEqual(written.map(({ name }) => name));
      for (const { name, offset, bytes: size } of tensors.values()) {
        expect(offset % alignment).toBe(0);
        expect(bytes.subarray(offset, offset + size)).toEqual(written.find((one) => one.name === name)!.data);
      }
    }
  });

  test('metadata of every type, in both versions', () => {
    const metadata: Entry[] = [
      ...([['u8', 200], ['i8', -100], ['u16', 65535], ['i16', -32768], ['u32', 2 ** 32 - 1], ['i32', -(2 ** 31)]] as const)
        .map(([type, value]): Entry => [type, type, value]),
      ['u64', 'u64', 2 ** 53 - 1], ['big', 'u64', 2n ** 64n - 1n], ['i64', 'i64', -(2 ** 53) + 1],
      ['f32', 'f32', 0.5], ['f64', 'f64', 0.1], ['bool', 'bool', true], ['string', 'string', '\ufeffé🦙\0'], ['', 'string', ''],
      ['list', ['i16'], [1, -2, 3]], ['strings', ['string'], ['a', '', 'ü']], ['empty', ['f64'], []], ['flags', ['bool'], [false, true]],
    ]; // prettier-ignore
    for (const version of [2, 3]) {
      const parsed = parseGguf(memorySource(writeGguf({ version, metadata })));
      expect(parsed.version).toBe(version);
      expect(Object.fromEntries(parsed.metadata)).toEqual(
        Object.fromEntries(metadata.map(([key, , value]) => [key, value])),
      );
    }
  });

  test('block sizes of every type are the published ones', () => {
    for (const type of Object.keys(typeNumbers) as (keyof typeof typeNumbers)[]) {
      const { values, bytes } = blocks[type];
      const one = tensor('t', [3, 2 * values], type);
      expect(parseGguf(memorySource(writeGguf({ tensors: [one] }))).tensors).toMatchObject([
        { type, shape: [3, 2 * values], bytes: 6 * bytes },
      ]);
    }
  });

  test('a file: opened, its tokenizer and template at hand, its fingerprint its own', () => {
    const folder = mkdtempSync(join(tmpdir(), 'innerkv-'));
    try {
      const write = (name: string, bytes: Uint8Array) => (
        writeFileSync(join(folder, name), bytes),
        join(folder, name)
      );
      const model = openModel(write('a.gguf', tinyGguf()));
      expect(model).toMatchObject({ name: 'tiny', format: 'GGUF', path: join(folder, 'a.gguf') });
      expect(model.tokenizer.decode(model.tokenizer.encode('hello world'))).toBe('hello world');
      expect(model.chat!.render([{ role: 'user', content: 'x' }])).toBe('<|im_start|>user: x\n');
      expect(openModel(write('b.gguf', tinyGguf())).fingerprint).toBe(model.fingerprint);
      const others = [
        tinyGguf({ 'llama.rope.freq_base': ['llama.rope.freq_base', 'f32', 10000] }),
        tinyGguf({}, () => tinyTensors(new Random(1))),
      ];
      for (const bytes of others)
        expect(openModel(write('c.gguf', bytes)).fingerprint).not.toBe(model.fingerprint);
      for (const path of [folder, join(folder, 'none.gguf')]) expect(() => openModel(path)).toThrow(KvError);
      expect(() => openModel(write('d.onnx', Uint8Array.of(1)))).toThrow(unsupported('a llama2.c .bin'));
      expect(() => openModel(write('e.gguf', Uint8Array.of(1)))).toThrow(corrupt('1 bytes'));
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
});

describe('variants of models', () => {
  const rename = (architecture: string): Record<string, Entry> => ({
    ...Object.fromEntries<Entry>(
      (
        [
          ['block_count', 'u32', 2],
          ['context_length', 'u32', 128],
          ['embedding_length', 'u32', 32],
          ['feed_forward_length', 'u32', 64],
          ['attention.head_count', 'u32', 2],
          ['attention.head_count_kv', 'u32', 1],
          ['attention.layer_norm_rms_epsilon', 'f32', 1e-6],
        ] as const
      ).map(([key, type, value]) => [key, [`${architecture}.${key}`, type, value]]),
    ),
    'general.architecture': ['general.architecture', 'string', architecture] as Entry,
  });
  const perLayer = (...tensors: [string, number][]) =>
    [0, 1].flatMap((i) => tensors.map(([name, extent]) => tensor(`blk.${i}.${name}`, [extent], 'F32')));
  const biases = perLayer(['attn_q.bias', 32], ['attn_k.bias', 16], ['attn_v.bias', 16]);

  test('Qwen2: biases, halves; Qwen3: norms of heads', () => {
    expect(open(tinyGguf(rename('qwen2'), (same) => [...same, ...biases])).config).toMatchObject({
      architecture: 'qwen2',
      attentionBias: true,
      qkNorm: false,
      rope: { base: 10000, layout: 'half' },
    });
    const norms = perLayer(['attn_q_norm.weight', 16], ['attn_k_norm.weight', 16]);
    expect(open(tinyGguf(rename('qwen3'), (same) => [...same, ...norms])).config).toMatchObject({
      attentionBias: false,
      qkNorm: true,
    });
  });

  test('a head of its own, wider heads, sliding windows, counts per layer', () => {
    const head = tensor('output.weight', [tinyTokens.length, 32], 'F16');
    expect(open(tinyGguf({}, (same) => [...same, head])).config.tiedHead).toBe(false);
    const wide = (name: string, shape: number[]) => (one: WrittenTensor) =>
      one.name.endsWith(name) ? tensor(one.name, shape, 'F32') : one;
    const wider = tinyGguf(
      {
        key: ['llama.attention.key_length', 'u32', 64],
        value: ['llama.attention.value_length', 'u32', 64],
        window: ['llama.attention.sliding_window', 'u32', 48],
        'llama.attention.head_count_kv': ['llama.attention.head_count_kv', ['u32'], [1, 1]],
        dims: ['llama.rope.dimension_count', 'u32', 32],
      },
      (same) =>
        same
          .map(wide('attn_q.weight', [128, 32]))
          .map(wide('attn_k.weight', [64, 32]))
          .map(wide('attn_v.weight', [64, 32]))
          .map(wide('attn_output.weight', [32, 128])),
    );
    expect(open(wider).config).toMatchObject({ headDim: 64, slidingWindow: 48, rope: { rotaryDims: 32 } });
  });

  test('context extension: linear, and divisors of the frequencies', () => {
    const linear = tinyGguf({
      type: ['llama.rope.scaling.type', 'string', 'linear'],
      factor: ['llama.rope.scaling.factor', 'f32', 4],
    });
    expect(open(linear).config.rope.scaling).toEqual({ type: 'linear', factor: 4 });
    const divisors = Float32Array.of(1, 1, 2, 4, 8, 8, 8, 8);
    const factors = { ...tensor('rope_freqs.weight', [8], 'F32'), data: new Uint8Array(divisors.buffer) };
    const { theta } = open(tinyGguf({}, (same) => [...same, factors])).config.rope;
    expect([...theta!]).toEqual([...divisors].map((divisor, i) => 50000 ** (-i / 8) / divisor));
    const bad = { ...factors, data: new Uint8Array(32) };
    expect(() => open(tinyGguf({}, (same) => [...same, bad]))).toThrow(corrupt('positive'));
    const long = tensor('rope_freqs.weight', [9], 'F32');
    long.data.fill(0x3f);
    expect(() => open(tinyGguf({}, (same) => [...same, long]))).toThrow(corrupt('9 numbers'));
  });

  const set = (key: string, type: ValueType, value: number | string): Record<string, Entry> => ({
    [key]: [key, type, value],
  });
  test.each<[string, Record<string, Entry | undefined>, Error]>([
    ['another architecture', set('general.architecture', 'string', 'mamba'), unsupported('"mamba"')],
    [
      'an architecture of the prototype',
      set('general.architecture', 'string', 'toString'),
      unsupported('"toString"'),
    ],
    ['no architecture', { 'general.architecture': undefined }, corrupt('no architecture')],
    ['a number for an architecture', set('general.architecture', 'u32', 1), corrupt('no architecture')],
    ['experts', set('llama.expert_count', 'u32', 8), unsupported('experts')],
    ['yarn', set('llama.rope.scaling.type', 'string', 'yarn'), unsupported('"yarn"')],
    ['no layers', { 'llama.block_count': undefined }, corrupt('lack llama.block_count')],
    ['zero layers', set('llama.block_count', 'u32', 0), corrupt('layers')],
    ['a negative number of layers', set('llama.block_count', 'i32', -1), corrupt('layers')],
    ['2^32 - 1 layers', set('llama.block_count', 'u32', 2 ** 32 - 1), corrupt('layers')],
    ['three layers', set('llama.block_count', 'u32', 3), corrupt('layers.2.attnNorm is missing')],
    ['one layer', set('llama.block_count', 'u32', 1), corrupt('layers.1.attnNorm has no place')],
    ['a text for a number', set('llama.embedding_length', 'string', '32'), corrupt('no number')],
    ['half a head', set('llama.attention.head_count', 'u32', 5), corrupt('headDim')],
    ['no heads', set('llama.attention.head_count', 'u32', 0), corrupt('queryHeads')],
    ['heads that do not divide', set('llama.attention.head_count_kv', 'u32', 3), corrupt('evenly')],
    [
      'other heads than the tensors',
      set('llama.attention.head_count_kv', 'u32', 2),
      corrupt('layers.0.k has shape'),
    ],
    ['epsilon 0', set('llama.attention.layer_norm_rms_epsilon', 'f32', 0), corrupt('epsilon')],
    ['epsilon NaN', set('llama.attention.layer_norm_rms_epsilon', 'f32', NaN), corrupt('epsilon')],
    ['base 0', set('llama.rope.freq_base', 'f32', 0), corrupt('rope.base')],
    ['base NaN', set('llama.rope.freq_base', 'f32', NaN), corrupt('rope.base')],
    ['odd rotary dimensions', set('llama.rope.dimension_count', 'u32', 7), corrupt('rotaryDims')],
    ['unequal keys and values', set('llama.attention.value_length', 'u32', 8), unsupported('differ')],
    [
      'a BOS out of the vocabulary',
      set('tokenizer.ggml.bos_token_id', 'u32', 1 << 20),
      corrupt('special token'),
    ],
    [
      'heads that differ by layer',
      { 'llama.attention.head_count_kv': ['llama.attention.head_count_kv', ['u32'], [1, 2]] },
      unsupported('layer to layer'),
    ],
  ])('%s', (_, changes, error) => {
    expect(() => open(tinyGguf(changes))).toThrow(error);
  });

  test.each<[string, (tensors: WrittenTensor[]) => WrittenTensor[], Error]>([
    ['a tensor missing', (same) => same.slice(1), corrupt('vocabulary')],
    ['a norm missing', (same) => same.slice(0, -1), corrupt('norm is missing')],
    ['an unknown tensor', (same) => [...same, tensor('blk.0.ssm.weight', [1], 'F32')], unsupported('ssm')],
    ['a bias of the output', (same) => [...same, tensor('blk.0.attn_output.bias', [32], 'F32')], unsupported('bias')],
    ['biases in one layer only', (same) => [...same, ...biases.slice(0, 3)], corrupt('layers.1.qBias is missing')],
    ['a layer with two names', (same) => [...same, tensor('blk.00.attn_q.weight', [32, 32], 'F32')], unsupported('blk.00')],
    ['a quantised norm', (same) => [...same.slice(0, -1), tensor('output_norm.weight', [32], 'Q8_0')], unsupported('vector')],
    ['a type from the other list', (same) => [{ ...same[0]!, type: 10 }, ...same.slice(1)], unsupported('Q2_K')],
  ])('%s', (_, change, error) => {
    expect(() => open(tinyGguf({}, change))).toThrow(error);
  }); // prettier-ignore
});

describe('what is wrong', () => {
  const one = (change: Partial<WrittenTensor>, parts: GgufParts = {}) =>
    writeGguf({ tensors: [{ ...tensor('t', [2, 32], 'Q8_0'), ...change }], ...parts });
  const raw = (key: string, ...bytes: number[]) => {
    const file = writeGguf({ metadata: [[key, 'u8', 0]] });
    return Uint8Array.of(...file.subarray(0, 24 + 8 + key.length), ...bytes);
  };
  const u32 = (value: number) => [value & 255, (value >> 8) & 255, (value >> 16) & 255, value >>> 24];
  const u64 = (value: number) => [...u32(value), 0, 0, 0, 0];

  test.each<[string, Uint8Array, Error]>([
    ['nothing', new Uint8Array(0), corrupt('0 bytes')],
    ['another magic', writeGguf({ magic: 'GGML' }), corrupt('"GGUF"')],
    ['a magic that is no text', writeGguf({}).with(0, 0xff), corrupt('"GGUF"')],
    ['version 0', writeGguf({ version: 0 }), unsupported('version 0')],
    ['version 1', writeGguf({ version: 1 }), unsupported('version 1')],
    ['version 4', writeGguf({ version: 4 }), unsupported('version 4')],
    ['big-endian', writeGguf({ version: 0x03000000 }), unsupported('big-endian')],
    ['2^64 - 1 tensors', writeGguf({ tensorCount: 2n ** 64n - 1n }), corrupt('count of tensors')],
    ['2^63 metadata', writeGguf({ metadataCount: 2n ** 63n }), corrupt('count of metadata')],
    ['more tensors than there are', writeGguf({ tensorCount: 1000 }), corrupt('ends at byte')],
    ['more metadata than there are', writeGguf({ metadataCount: 1000 }), corrupt('ends at byte')],
    ['a key twice', writeGguf({ metadata: [['a', 'u8', 1], ['a', 'u8', 1]] }), corrupt('"a" twice')],
    ['a tensor twice', writeGguf({ tensors: [tensor('t', [1], 'F32'), tensor('t', [1], 'F32')] }), corrupt('"t" twice')],
    ['a value of type 13', raw('k', ...u32(13)), corrupt('unknown type 13')],
    ['a list of type 13', raw('k', ...u32(9), ...u32(13), ...u64(0)), corrupt('unknown type 13')],
    ['a list of lists', raw('k', ...u32(9), ...u32(9), ...u64(1)), unsupported('arrays of arrays')],
    ['a list longer than the file', raw('k', ...u32(9), ...u32(4), ...u64(1 << 20)), corrupt('behind the file')],
    ['a list of 2^32 numbers', raw('k', ...u32(9), ...u32(4), 0, 0, 0, 0, 1, 0, 0, 0), corrupt('an array of 4294967296')],
    ['a string longer than the file', raw('k', ...u32(8), ...u64(100)), corrupt('a string length')],
    ['a string of 2^64 - 1 bytes', raw('k', ...u32(8), ...new Array<number>(8).fill(255)), corrupt('a string length')],
    ['a string that is no UTF-8', raw('k', ...u32(8), ...u64(2), 0xc3, 0x28), corrupt('not UTF-8')],
    ['a key that is no UTF-8', writeGguf({ metadata: [['kk', 'u8', 0]] }).with(32, 0xff), corrupt('not UTF-8')],
    ['a truth value of 2', writeGguf({ metadata: [['k', 'bool', 2]] }), corrupt('truth value')],
    ...[0, 1, 7, 12, 31, 33, 1 << 20].map((alignment): [string, Uint8Array, Error] => [
      `alignment ${alignment}`,
      writeGguf({ metadata: [['general.alignment', 'u32', alignment]] }),
      corrupt('power of two'),
    ]),
    ['an alignment in words', writeGguf({ metadata: [['general.alignment', 'string', '32']] }), corrupt('power of two')],
    ['no dimensions', one({ shape: [] }), corrupt('0 dimensions')],
    ['five dimensions', one({ shape: [1, 1, 1, 1, 64] }), corrupt('5 dimensions')],
    ['a dimension of 0', one({ shape: [0, 32] }), corrupt('shape [0, 32]')],
    ['a negative dimension', one({ shape: [-1n & (2n ** 64n - 1n), 32] }), corrupt('a dimension of')],
    ['half a block', one({ shape: [4, 16] }), corrupt('shape [4, 16]')],
    ['a product beyond 2^53', one({ shape: [2 ** 30, 2 ** 30] }), corrupt('shape')],
    ['a product that comes back to 0 in 64 bits', one({ shape: [2 ** 32, 2 ** 32] }), corrupt('shape')],
    ['type 4, which is gone', one({ type: 4 }), corrupt('unknown type 4')],
    ['type 2^32 - 1', one({ type: 2 ** 32 - 1 }), corrupt('unknown type 4294967295')],
    ['an offset behind the file', one({ offset: 32 }), corrupt('cut off')],
    ['an offset of 2^53 - 1', one({ offset: Number.MAX_SAFE_INTEGER }), corrupt('cut off')],
    ['an offset of 2^64 - 32', one({ offset: 2n ** 64n - 32n }), corrupt('an offset of')],
    ['an offset between', writeGguf({ tensors: [tensor('a', [64], 'F32'), { ...tensor('b', [1], 'F32'), offset: 4 }] }), corrupt('aligned')],
    ['an overlap', writeGguf({ tensors: [tensor('a', [64], 'F32'), { ...tensor('b', [1], 'F32'), offset: 32 }] }), corrupt('overlaps')],
    ['the same place twice', writeGguf({ tensors: [tensor('a', [64], 'F32'), { ...tensor('b', [64], 'F32'), offset: 0 }] }), corrupt('overlaps')],
  ])('%s', (_, bytes, error) => {
    expect(() => parseGguf(memorySource(bytes))).toThrow(error);
  }); // prettier-ignore

  test('lists that would fill the memory together', () => {
    const list = (key: string) => [
      ...u64(1),
      ...new TextEncoder().encode(key),
      ...u32(9),
      ...u32(0),
      ...u64(2 ** 21),
    ];
    const parts = ['a', 'b', 'c', 'd', 'e'].flatMap((key) => [
      Uint8Array.from(list(key)),
      new Uint8Array(2 ** 21),
    ]);
    const file = Buffer.concat([writeGguf({ metadataCount: 5 }).subarray(0, 24), ...parts]);
    expect(() => parseGguf(memorySource(file))).toThrow(corrupt('an array of 2097152 cannot be (at most 0)'));
  });

  test('cut off at every length', () => {
    const metadata: Entry[] = [...tinyMetadata, ['words', ['string'], ['a', 'bc', '']]];
    const bytes = writeGguf({ metadata, tensors: tinyTensors().slice(0, 4) });
    const { tensors } = parseGguf(memorySource(bytes));
    const end = Math.max(...tensors.map((one) => one.offset + one.bytes));
    // Every byte of the header, then every 61st of the data and its last bytes.
    const header = tensors[0]!.offset;
    for (let length = 0; length < end; length += length < header || end - length < 70 ? 1 : 61)
      expect(() => parseGguf(memorySource(bytes.subarray(0, length)))).toThrow(
        failure('ERR_INNERKV_CORRUPT'),
      );
    expect(parseGguf(memorySource(bytes.subarray(0, end))).tensors).toHaveLength(tensors.length);
  });
});

/** Reading that keeps count: a hostile length must not make the reader ask for more than there is. */
function countingSource(bytes: Uint8Array) {
  const source = memorySource(bytes);
  const counting = {
    ...source,
    asked: 0,
    read(at: number, count: number) {
      expect(at >= 0 && count >= 0 && at + count <= bytes.length).toBe(true);
      counting.asked += count;
      return source.read(at, count);
    },
  };
  return counting;
}

test('mutations: a KvError or a model, never anything else, and never more bytes than the file has', () => {
  const random = new Random(20);
  const original = tinyGguf();
  const header = parseGguf(memorySource(original)).tensors[0]!.offset;
  const lengths = [0, 1, 2, 3, 7, 8, 9, 31, 127, 128, 255];
  const outcomes = { models: 0, tokenizers: 0, errors: 0 };
  for (let round = 0; round < 2500; round++) {
    const bytes = original.slice();
    const view = new DataView(bytes.buffer);
    for (let count = 1 + random.below(3); count > 0; count--) {
      const at = random.below(header - 8);
      const kind = random.below(6);
      if (kind === 0) bytes[at]! ^= 1 << random.below(8);
      else if (kind === 1) bytes[at] = random.pick(lengths);
      else if (kind === 2) view.setUint32(at, random.pick([0, 0x7fffffff, 0x80000000, 0xffffffff, 13]), true);
      else if (kind === 3)
        view.setBigUint64(at, random.pick([0n, 2n ** 63n, 2n ** 64n - 1n, 2n ** 32n]), true);
      else if (kind === 4) bytes.copyWithin(at, random.below(header), random.below(header));
      else bytes.fill(random.below(256), at, at + random.below(16));
    }
    const source = countingSource(
      random.below(4) === 0 ? bytes.subarray(0, random.below(bytes.length)) : bytes,
    );
    try {
      const gguf = parseGguf(source);
      try {
        ggufModel(gguf, source);
        outcomes.models++;
      } finally {
        const tokenizer = ggufTokenizer(gguf);
        tokenizer.decode(tokenizer.encode('hello world \u00e9 42', { special: true }));
        outcomes.tokenizers++;
      }
    } catch (error) {
      if (!(error instanceof KvError)) throw new Error(`round ${round}`, { cause: error });
      outcomes.errors++;
    }
    expect(source.asked).toBeLessThan(3 * bytes.length + (1 << 17));
  }
  // The mutations reach all depths.
  expect(outcomes.errors).toBeGreaterThan(800);
  expect(outcomes.models).toBeGreaterThan(100);
  expect(outcomes.tokenizers).toBeGreaterThan(100);
});
