/** Ternary checkpoints made here. */
import { KvError } from '../../lib/errors';
import { bitllamaModel } from '../../lib/model/bitllama';
import { memorySource } from '../../lib/model/bytes';
import { writeBitllama } from '../support/bitllama';
import { failure } from '../support/failures';
import { type Llama2cHeader } from '../support/llama2c';
import { Random } from '../support/random';

const open = (bytes: Uint8Array) => bitllamaModel(memorySource(bytes));
const corrupt = (text: string) => failure('ERR_INNERKV_CORRUPT', text);
const unsupported = (text: string) => failure('ERR_INNERKV_UNSUPPORTED', text);
const header: Llama2cHeader = [64, 96, 2, 4, 2, 10, 8];

test('configuration, places and scales in the order of the format', () => {
  const { config, tensors } = open(writeBitllama(header));
  expect(config).toEqual({
    ...{ architecture: 'llama', layers: 2, hidden: 64, intermediate: 96, queryHeads: 4, kvHeads: 2 },
    ...{ headDim: 16, vocabulary: 10, contextLength: 8, rmsEpsilon: 1e-5 },
    ...{ rope: { base: 10000, layout: 'adjacent' }, bareNorms: true, qkNorm: false, attentionBias: false },
    ...{ tiedHead: true, bos: 1, eos: [1, 2] },
  });
  const places = [...tensors].map(([name, { type, offset, bytes, scale }]) => [name, type, offset, bytes, scale]);
  let at = 256 + 4 * 64 * 11;
  let matrix = 0;
  const sizes = [1024, 512, 512, 1024, 1536, 1536, 1536];
  const expected = ['q', 'k', 'v', 'o', 'gate', 'down', 'up'].flatMap((name, i) =>
    [0, 1].map((layer) => {
      at += 4 + sizes[i]!;
      return [`layers.${layer}.${name}`, 'TERNARY', at - sizes[i]!, sizes[i], ++matrix / (name === 'down' ? 96 : 64)];
    }),
  );
  expect(places).toEqual([
    ['norm', 'F32', 256, 256, undefined],
    ['embed', 'F32', 512, 2560, undefined],
    ...expected,
  ]);
  expect(tensors.get('layers.0.down')!.shape).toEqual([64, 96]);
  expect(tensors.has('layers.0.attnNorm')).toBe(false);
}); // prettier-ignore

/** The same header over float32 weights, as other programs write version 1. */
function float32(flag: number): Uint8Array {
  const floats = 10 * 64 * (flag ? 1 : 2) + 64 + 2 * (2 * 64 + 3 * 64 * 64 + 3 * 64 * 96);
  const bytes = new Uint8Array(256 + 4 * floats);
  bytes.set(writeBitllama(header, { flag }).subarray(0, 256));
  return bytes;
}

test.each<[string, Uint8Array, Error]>([
  ['a magic only', writeBitllama(header).subarray(0, 4), corrupt('4 bytes')],
  ['a header only', writeBitllama(header).subarray(0, 256), corrupt('asks for')],
  ['a byte too few', writeBitllama(header).subarray(0, -1), corrupt('asks for')],
  ['a byte too many', writeBitllama(header, { extra: 1 }), corrupt('asks for')],
  ['another version', writeBitllama(header, { version: 2 }), unsupported('version 2')],
  ['version 1 in float32', float32(1), unsupported('in float32')],
  ['version 1 in float32 with a head of its own', float32(0), unsupported('in float32')],
  ['a head of its own', writeBitllama(header, { flag: 0 }), unsupported('head of its own')],
  ['a flag that is none', writeBitllama(header, { flag: 2 }), corrupt('flag')],
  ['rows that are no whole blocks', writeBitllama([48, 96, 2, 4, 2, 10, 8]), unsupported('multiples of 32')],
  ['a head that tells its size by a sign', writeBitllama([64, 96, 2, 4, 2, -10, 8].map(Math.abs) as unknown as Llama2cHeader).with(31, 255), corrupt('vocabulary')],
  ['a scale that is no number', withScale(NaN), corrupt('scale')],
  ['an infinite scale', withScale(-Infinity), corrupt('scale')],
])('refused: %s', (_, bytes, error) => expect(() => open(bytes)).toThrow(error)); // prettier-ignore

function withScale(scale: number): Uint8Array {
  const bytes = writeBitllama(header);
  new DataView(bytes.buffer).setFloat32(256 + 4 * 64 * 11, scale, true);
  return bytes;
}

test('any header: a KvError or a model', () => {
  const random = new Random(4);
  let errors = 0;
  for (let round = 0; round < 3000; round++) {
    const bytes = writeBitllama(header);
    const view = new DataView(bytes.buffer);
    const values = [0, 1, -1, 2, 4, 8, 16, 32, 64, 96, 2 ** 31 - 1, -(2 ** 31), 65536];
    for (let i = 0; i <= random.below(3); i++)
      view.setInt32(4 * (1 + random.below(8)), random.pick(values), true);
    if (random.below(8) === 0) bytes[36] = random.below(256);
    try {
      open(bytes);
    } catch (error) {
      if (!(error instanceof KvError)) throw error;
      errors++;
    }
  }
  expect(errors).toBeGreaterThan(2000);
  expect(errors).toBeLessThan(3000);
});
