/** Writes GGUF files, right ones and wrong ones; and a tiny model with a byte-level vocabulary. */
import { blocks, type StoredType } from '../reference/dequantise';
import { Random } from './random';

/** Numbers of the metadata's types. */
export const valueTypes = {
  u8: 0, i8: 1, u16: 2, i16: 3, u32: 4, i32: 5, f32: 6, bool: 7, string: 8, array: 9, u64: 10, i64: 11, f64: 12,
} as const; // prettier-ignore
export type ValueType = keyof typeof valueTypes;

export type GgufType = Exclude<StoredType, 'TERNARY'>;
export const typeNumbers: Readonly<Record<GgufType, number>> = {
  F32: 0, F16: 1, Q4_0: 2, Q4_1: 3, Q5_0: 6, Q5_1: 7, Q8_0: 8, Q4_K: 12, Q6_K: 14, BF16: 30,
}; // prettier-ignore

type Scalar = number | bigint | string | boolean;
/** Key, type, value; for lists, key, [type], values. */
export type Entry =
  | readonly [key: string, type: ValueType, value: Scalar]
  | readonly [key: string, types: readonly [ValueType], values: readonly Scalar[]];

export interface WrittenTensor {
  readonly name: string;
  /** Row-major, outermost first. */
  readonly shape: readonly (number | bigint)[];
  readonly type: number;
  readonly data: Uint8Array;
  /** Instead of the next free place. */
  readonly offset?: number | bigint;
}

export interface GgufParts {
  readonly magic?: string;
  readonly version?: number;
  readonly alignment?: number;
  readonly tensorCount?: number | bigint;
  readonly metadataCount?: number | bigint;
  readonly metadata?: readonly Entry[];
  readonly tensors?: readonly WrittenTensor[];
}

/** Bytes that grow. */
export class Writer {
  private readonly bytes: number[] = [];

  get length(): number {
    return this.bytes.length;
  }

  raw(bytes: Iterable<number>): this {
    for (const byte of bytes) this.bytes.push(byte);
    return this;
  }

  value(type: ValueType, value: Scalar): this {
    const view = new DataView(new ArrayBuffer(8));
    const number = Number(value);
    const size = {
      u8: () => (view.setUint8(0, number), 1),
      i8: () => (view.setInt8(0, number), 1),
      u16: () => (view.setUint16(0, number, true), 2),
      i16: () => (view.setInt16(0, number, true), 2),
      u32: () => (view.setUint32(0, number, true), 4),
      i32: () => (view.setInt32(0, number, true), 4),
      f32: () => (view.setFloat32(0, number, true), 4),
      f64: () => (view.setFloat64(0, number, true), 8),
      u64: () => (view.setBigUint64(0, BigInt(value), true), 8),
      i64: () => (view.setBigInt64(0, BigInt(value), true), 8),
      bool: () => (view.setUint8(0, number), 1),
      array: () => 0,
      string: () => {
        const text = new TextEncoder().encode(String(value));
        this.value('u64', text.length).raw(text);
        return 0;
      },
    }[type]();
    return this.raw(new Uint8Array(view.buffer, 0, size));
  }

  finish(): Uint8Array {
    return Uint8Array.from(this.bytes);
  }
}

export function writeGguf(parts: GgufParts): Uint8Array {
  const { version = 3, alignment = 32, metadata = [], tensors = [] } = parts;
  const writer = new Writer().raw(new TextEncoder().encode(parts.magic ?? 'GGUF')).value('u32', version);
  writer.value('u64', parts.tensorCount ?? tensors.length);
  writer.value('u64', parts.metadataCount ?? metadata.length);
  for (const [key, type, value] of metadata) {
    writer.value('string', key);
    if (typeof type === 'string') writer.value('u32', valueTypes[type]).value(type, value);
    else {
      writer.value('u32', valueTypes.array).value('u32', valueTypes[type[0]]).value('u64', value.length);
      for (const item of value) writer.value(type[0], item);
    }
  }
  let next = 0;
  for (const { name, shape, type, data, offset } of tensors) {
    writer.value('string', name).value('u32', shape.length);
    for (const extent of shape.toReversed()) writer.value('u64', extent);
    writer.value('u32', type).value('u64', offset ?? next);
    next += Math.ceil(data.length / alignment) * alignment;
  }
  const pad = () => writer.raw(new Uint8Array((alignment - (writer.length % alignment)) % alignment));
  pad();
  for (const { data } of tensors) {
    writer.raw(data);
    pad();
  }
  return writer.finish();
}

export function tensor(
  name: string,
  shape: readonly number[],
  type: GgufType,
  random?: Random,
): WrittenTensor {
  const { values, bytes } = blocks[type];
  const count = shape.reduce((product, extent) => product * extent, 1);
  const data = new Uint8Array((count / values) * bytes);
  if (random) for (let i = 0; i < data.length; i++) data[i] = random.below(256);
  return { name, shape, type: typeNumbers[type], data };
}

/** The 256 characters of byte-level vocabularies, in the order of bytes. */
export const byteAlphabet: readonly string[] = (() => {
  const visible = [[33, 126], [161, 172], [174, 255]]; // prettier-ignore
  const out = new Array<string>(256);
  for (const [first, last] of visible) for (let b = first!; b <= last!; b++) out[b] = String.fromCharCode(b);
  let next = 256;
  for (let b = 0; b < 256; b++) out[b] ??= String.fromCharCode(next++);
  return out;
})();

export const tinyMerges = [
  'h e',
  'l l',
  'he ll',
  'hell o',
  '\u0120 w',
  'o r',
  '\u0120w or',
  'l d',
  '\u0120wor ld',
];
export const tinyTokens: readonly string[] = [
  ...['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
  ...byteAlphabet,
  ...tinyMerges.map((merge) => merge.replace(' ', '')),
];
export const tinyVocabulary: readonly Entry[] = [
  ['tokenizer.ggml.model', 'string', 'gpt2'],
  ['tokenizer.ggml.pre', 'string', 'smollm'],
  ['tokenizer.ggml.tokens', ['string'], tinyTokens],
  ['tokenizer.ggml.token_type', ['i32'], tinyTokens.map((_, id) => (id < 3 ? 3 : 1))],
  ['tokenizer.ggml.merges', ['string'], tinyMerges],
  ['tokenizer.ggml.bos_token_id', 'u32', 1],
  ['tokenizer.ggml.eos_token_id', 'u32', 2],
  ['tokenizer.chat_template', 'string', '{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}'],
]; // prettier-ignore

/** 2 layers of 32 channels, 2 query heads and 1 KV head of 16, feed-forward 64. */
export const tinyMetadata: readonly Entry[] = [
  ['general.architecture', 'string', 'llama'],
  ['general.name', 'string', 'tiny'],
  ['llama.block_count', 'u32', 2],
  ['llama.context_length', 'u32', 128],
  ['llama.embedding_length', 'u32', 32],
  ['llama.feed_forward_length', 'u32', 64],
  ['llama.attention.head_count', 'u32', 2],
  ['llama.attention.head_count_kv', 'u32', 1],
  ['llama.attention.layer_norm_rms_epsilon', 'f32', 1e-5],
  ['llama.rope.freq_base', 'f32', 50000],
];

export function tinyTensors(random?: Random): WrittenTensor[] {
  const make = (name: string, shape: number[], type: GgufType) => tensor(name, shape, type, random);
  const layer = (i: number) => [
    make(`blk.${i}.attn_norm.weight`, [32], 'F32'),
    make(`blk.${i}.attn_q.weight`, [32, 32], 'Q4_1'),
    make(`blk.${i}.attn_k.weight`, [16, 32], 'Q4_0'),
    make(`blk.${i}.attn_v.weight`, [16, 32], 'Q5_1'),
    make(`blk.${i}.attn_output.weight`, [32, 32], 'Q5_0'),
    make(`blk.${i}.ffn_norm.weight`, [32], 'F32'),
    make(`blk.${i}.ffn_gate.weight`, [64, 32], 'F16'),
    make(`blk.${i}.ffn_up.weight`, [64, 32], 'BF16'),
    make(`blk.${i}.ffn_down.weight`, [32, 64], 'Q8_0'),
  ];
  return [
    make('token_embd.weight', [tinyTokens.length, 32], 'Q8_0'),
    ...layer(0),
    ...layer(1),
    make('output_norm.weight', [32], 'F32'),
  ];
}

/** The tiny model, with `changes` to its metadata (undefined takes a key away) and its tensors. */
export function tinyGguf(
  changes: Readonly<Record<string, Entry | undefined>> = {},
  tensors: (tensors: WrittenTensor[]) => readonly WrittenTensor[] = (same) => same,
  parts: GgufParts = {},
): Uint8Array {
  const all = [...tinyMetadata, ...tinyVocabulary];
  const metadata = all.flatMap((entry) => (entry[0] in changes ? [] : [entry]));
  metadata.push(...Object.values(changes).filter((entry) => entry !== undefined));
  return writeGguf({ metadata, tensors: tensors(tinyTensors()), ...parts });
}

/** The tiny model with weights that make sense: it writes chance, but it runs. */
export function runnableGguf(): Uint8Array {
  const random = new Random(3);
  return tinyGguf({}, (tensors) =>
    tensors.map((one) => {
      const shape = one.shape.map(Number);
      const count = shape.reduce((a, b) => a * b, 1);
      const spread = one.name === 'token_embd.weight' ? 1 : 1 / Math.sqrt(shape[1] ?? 1);
      const data = shape.length === 1 ? new Float32Array(count).fill(1) : random.gaussians(count, spread);
      return { ...one, type: typeNumbers.F32, data: new Uint8Array(data.buffer) };
    }),
  );
}
