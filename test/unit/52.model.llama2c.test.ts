/** Checkpoints of llama2.c made here. */
import { KvError } from '../../lib/errors';
import { memorySource } from '../../lib/model/bytes';
import { llama2cModel } from '../../lib/model/llama2c';
import { failure } from '../support/failures';
import { writeLlama2c, type Llama2cHeader } from '../support/llama2c';
import { Random } from '../support/random';

const open = (bytes: Uint8Array) => llama2cModel(memorySource(bytes));
const corrupt = (text: string) => failure('ERR_INNERKV_CORRUPT', text);
const header: Llama2cHeader = [16, 40, 2, 4, 2, 10, 8];

test('configuration, and tensors one after the other in the order of the format', () => {
  const { config, tensors } = open(writeLlama2c(header));
  expect(config).toEqual({
    ...{
      architecture: 'llama',
      layers: 2,
      hidden: 16,
      intermediate: 40,
      queryHeads: 4,
      kvHeads: 2,
      headDim: 4,
    },
    ...{ vocabulary: 10, contextLength: 8, rmsEpsilon: 1e-5, rope: { base: 10000, layout: 'adjacent' } },
    ...{ qkNorm: false, attentionBias: false, tiedHead: true, bos: 1, eos: [1, 2] },
  });
  const places = [...tensors].map(([name, { offset, bytes }]) => [name, offset, bytes]);
  const sizes: [string, number][] = [
    ['embed', 160],
    ...['attnNorm', 'q', 'k', 'v', 'o', 'ffnNorm', 'gate', 'down', 'up'].flatMap(
      (name, i): [string, number][] => {
        const size = [16, 256, 128, 128, 256, 16, 640, 640, 640][i]!;
        return [[`layers.0.${name}`, size], [`layers.1.${name}`, size]]; // prettier-ignore
      },
    ),
    ['norm', 16],
  ];
  let at = 28;
  const expected = sizes.map(([name, size]) => [name, (at += 4 * size) - 4 * size, 4 * size]);
  expect(places).toEqual(expected);
  expect(tensors.get('layers.0.down')!.shape).toEqual([16, 40]);
  expect(tensors.get('layers.0.gate')!.shape).toEqual([40, 16]);
});

test('a head of its own lies at the end', () => {
  const bytes = writeLlama2c([16, 40, 2, 4, 2, -10, 8]);
  const { config, tensors } = open(bytes);
  expect(config).toMatchObject({ tiedHead: false, vocabulary: 10 });
  expect(tensors.get('head')).toMatchObject({ shape: [10, 16], offset: bytes.length - 640, bytes: 640 });
});

test.each<[string, Uint8Array, Error]>([
  ['nothing', new Uint8Array(0), corrupt('0 bytes')],
  ['a header only', writeLlama2c(header).subarray(0, 28), corrupt('asks for')],
  ['a byte too few', writeLlama2c(header).subarray(0, -1), corrupt('asks for')],
  ['a byte too many', writeLlama2c(header, 1), corrupt('asks for')],
  ['zeros', new Uint8Array(28), corrupt('must be an integer')],
  ['all ones', new Uint8Array(28).fill(255), corrupt('must be an integer')],
  ['the largest numbers', new Uint8Array(28).map((_, i) => (i % 4 === 3 ? 127 : 255)), corrupt('must be an integer')],
])('refused: %s', (_, bytes, error) => expect(() => open(bytes)).toThrow(error)); // prettier-ignore

test('any header: a KvError or a model', () => {
  const random = new Random(4);
  let errors = 0;
  for (let round = 0; round < 3000; round++) {
    const bytes = writeLlama2c(header);
    const view = new DataView(bytes.buffer);
    const values = [0, 1, -1, 2, 4, 8, 16, 2 ** 31 - 1, -(2 ** 31), 65536];
    for (let i = 0; i <= random.below(3); i++) view.setInt32(4 * random.below(7), random.pick(values), true);
    try {
      open(bytes);
    } catch (error) {
      if (!(error instanceof KvError)) throw error;
      errors++;
    }
  }
  expect(errors).toBeGreaterThan(2000);
});
