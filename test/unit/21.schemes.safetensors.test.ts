import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { encodeMoments, parseMoments, readMoments, selectLayers } from '../../lib/schemes/moments';
import { decodeFloats, encodeSafetensors, parseSafetensors } from '../../lib/schemes/safetensors';
import { fromHalfBits } from '../reference/half';
import { failure } from '../support/failures';
import { Random } from '../support/random';

function file(header: unknown, data = new Uint8Array(0)): Uint8Array {
  const json = new TextEncoder().encode(typeof header === 'string' ? header : JSON.stringify(header));
  const bytes = new Uint8Array(8 + json.length + data.length);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(json.length), true);
  bytes.set(json, 8);
  bytes.set(data, 8 + json.length);
  return bytes;
}

const f32 = (shape: number[], begin: number, end: number) => ({
  dtype: 'F32',
  shape,
  data_offsets: [begin, end],
});
const corrupt = (message: string) => failure('ERR_INNERKV_CORRUPT', message);

const four = new Uint8Array(16);

describe('the container', () => {
  test('what was encoded is read back, in order and with metadata', () => {
    const tensors = new Map([
      ['b', { shape: [2, 2], data: Float32Array.of(1, -2, 3.5, 2 ** -149) }],
      ['a', { shape: [], data: Float32Array.of(7) }],
      ['empty', { shape: [0, 5], data: new Float32Array(0) }],
    ]);
    const parsed = parseSafetensors(encodeSafetensors(tensors, { model: 'x' }));
    expect([...parsed.tensors.keys()]).toEqual(['b', 'a', 'empty']);
    for (const [name, { shape, data }] of tensors) {
      expect(parsed.tensors.get(name)!.shape).toEqual(shape);
      expect(decodeFloats(parsed.tensors.get(name)!)).toEqual(data);
    }
    expect(parsed.metadata.get('model')).toBe('x');
  });

  test('a file that starts at an odd address is read too', () => {
    const bytes = encodeSafetensors(new Map([['a', { shape: [2], data: Float32Array.of(1, 2) }]]));
    const moved = new Uint8Array(bytes.length + 1);
    moved.set(bytes, 1);
    expect(decodeFloats(parseSafetensors(moved.subarray(1)).tensors.get('a')!)).toEqual(
      Float32Array.of(1, 2),
    );
  });

  test('all binary16 patterns, bfloat16 and float64', () => {
    const patterns = Uint16Array.from({ length: 65536 }, (_, i) => i);
    const halves = decodeFloats({ dtype: 'F16', shape: [65536], bytes: new Uint8Array(patterns.buffer) })!;
    expect(halves).toEqual(Float32Array.from(patterns, fromHalfBits));
    const bf16 = new Uint8Array(Uint16Array.of(0x3f80, 0xc040, 0x7f80).buffer);
    expect(decodeFloats({ dtype: 'BF16', shape: [3], bytes: bf16 })).toEqual(
      Float32Array.of(1, -3, Infinity),
    );
    const f64 = new Uint8Array(Float64Array.of(1 / 3).buffer);
    expect(decodeFloats({ dtype: 'F64', shape: [1], bytes: f64 })).toEqual(Float64Array.of(1 / 3));
    expect(decodeFloats({ dtype: 'I8', shape: [1], bytes: new Uint8Array(1) })).toBeUndefined();
  });

  test.each<[string, Uint8Array, string]>([
    ['nothing', new Uint8Array(0), '0 bytes'],
    ['half a length', new Uint8Array(7), '7 bytes'],
    ['a header longer than the file', file('{}').with(0, 3), 'ends before its header'],
    ['a header of 2^64 - 1 bytes', new Uint8Array(8).fill(255), 'ends before its header'],
    ['a header that is no JSON', file('{"a":'), 'not JSON'],
    ['a header that is no UTF-8', file('{"a": 1}').with(9, 0xff), 'not JSON'],
    ['a header that is a list', file('[]'), 'not a JSON object'],
    ['a header of null', file('null'), 'not a JSON object'],
    ['metadata that are a list', file({ __metadata__: [] }), 'metadata'],
    ['metadata that are no strings', file({ __metadata__: { a: 1 } }), 'not a string'],
    ['a tensor without description', file({ a: 1 }), 'no description'],
    ['an unknown type', file({ a: { ...f32([4], 0, 16), dtype: 'F31' } }, four), '"F31"'],
    [
      'a type of the prototype',
      file({ a: { ...f32([4], 0, 16), dtype: 'constructor' } }, four),
      'unknown type',
    ],
    ['no shape', file({ a: { dtype: 'F32', data_offsets: [0, 16] } }, four), 'no valid shape'],
    ['a negative extent', file({ a: f32([-1, -4], 0, 16) }, four), 'no valid shape'],
    ['a fractional extent', file({ a: f32([0.5, 8], 0, 16) }, four), 'no valid shape'],
    ['an overflowing shape', file({ a: f32([2 ** 40, 2 ** 40], 0, 16) }, four), 'cannot have'],
    [
      'three offsets',
      file({ a: { ...f32([4], 0, 16), data_offsets: [0, 8, 16] } }, four),
      'no valid offsets',
    ],
    ['an end before the beginning', file({ a: f32([4], 16, 0) }, four), 'cannot have'],
    ['too many bytes for the shape', file({ a: f32([3], 0, 16) }, four), 'cannot have'],
    ['data that end early', file({ a: f32([8], 0, 32) }, four), 'truncated'],
    ['an overlap', file({ a: f32([4], 0, 16), b: f32([2], 8, 16) }, four), 'overlaps'],
    ['the same bytes twice', file({ a: f32([4], 0, 16), b: f32([4], 0, 16) }, four), 'overlaps'],
    ['a gap', file({ a: f32([1], 0, 4), b: f32([1], 8, 12) }, four), 'gap'],
    ['bytes of no tensor', file({ a: f32([3], 0, 12) }, four), '4 bytes belong to no tensor'],
  ])('%s is corrupt', (_, bytes, message) => {
    expect(() => parseSafetensors(bytes)).toThrow(corrupt(message));
  });

  test('any single changed byte either still parses or is a typed error', () => {
    const bytes = encodeSafetensors(new Map([['a', { shape: [2], data: Float32Array.of(1, 2) }]]));
    for (let at = 0; at < bytes.length; at++)
      for (const value of [0, 0x22, 0x39, 0x7d, 0xff])
        try {
          parseSafetensors(bytes.with(at, value));
        } catch (error) {
          expect(error).toEqual(corrupt(''));
        }
  });
});

describe('moments', () => {
  const random = new Random(1);
  const square = () => {
    const root = random.gaussians(64);
    return Float32Array.from({ length: 64 * 64 }, (_, i) => root[i % 64]! * root[Math.floor(i / 64)]!);
  };
  const head = () => ({ keyMean: random.gaussians(64), keyMoment: square(), queryMoment: square() });
  const moments = {
    kvHeads: 2,
    headDim: 64,
    layers: new Map([
      [3, [head(), head()]],
      [5, [head(), head()]],
    ]),
  };
  const changed = (change: (tensors: Map<string, { shape: number[]; data: Float32Array }>) => unknown) => {
    const tensors = new Map(
      [...parseSafetensors(encodeMoments(moments)).tensors].map(([name, tensor]) => [
        name,
        { shape: [...tensor.shape], data: decodeFloats(tensor) as Float32Array },
      ]),
    );
    change(tensors);
    return () => parseMoments(parseSafetensors(encodeSafetensors(tensors)));
  };

  test('round trip', () => {
    expect(changed(() => undefined)()).toEqual(moments);
  });

  test('tensors that are no moments are ignored', () => {
    const file = changed((tensors) => tensors.set('layers.3.key', { shape: [1], data: new Float32Array(1) }));
    expect(file()).toEqual(moments);
  });

  test.each<[string, Parameters<typeof changed>[0], string]>([
    ['no moments at all', (tensors) => tensors.clear(), 'no moments'],
    [
      'a missing part',
      (tensors) => tensors.delete('layers.5.key_moment'),
      '"layers.5.key_moment" is missing',
    ],
    [
      'a mean of the wrong rank',
      (tensors) => (tensors.get('layers.3.key_mean')!.shape = [128]),
      '[kvHeads, headDim]',
    ],
    [
      'another number of heads',
      (tensors) => (tensors.get('layers.5.key_mean')!.shape = [1, 128]),
      '[1, 128]',
    ],
    ['infinity', (tensors) => (tensors.get('layers.5.key_moment')!.data[7] = Infinity), 'finite'],
    ['NaN', (tensors) => (tensors.get('layers.3.key_mean')!.data[7] = NaN), 'finite'],
    [
      'a negative square',
      (tensors) => (tensors.get('layers.5.query_moment')!.data[65] = -1),
      'negative square',
    ],
    [
      'an asymmetric matrix',
      (tensors) => (tensors.get('layers.3.query_moment')!.data[1]! += 9),
      'not symmetric',
    ],
  ])('%s is corrupt', (_, change, message) => {
    expect(changed(change)).toThrow(corrupt(message));
  });

  test('integers are no moments', () => {
    const entry = { dtype: 'I32', shape: [1, 1], data_offsets: [0, 4] };
    expect(() =>
      parseMoments(parseSafetensors(file({ 'layers.0.key_mean': entry }, new Uint8Array(4)))),
    ).toThrow(corrupt('I32'));
  });

  test('layers are selected and renumbered', () => {
    const chosen = selectLayers(moments, [5, 3]);
    expect([...chosen.layers]).toEqual([
      [0, moments.layers.get(5)],
      [1, moments.layers.get(3)],
    ]);
    expect(() => selectLayers(moments, [4])).toThrow('layer 4');
  });

  test('files: what is not there is an invalid argument, what is cut short is corrupt', () => {
    const folder = mkdtempSync(join(tmpdir(), 'innerkv-'));
    try {
      const path = join(folder, 'm.safetensors');
      expect(() => readMoments(path)).toThrow(failure('ERR_INNERKV_INVALID_ARGUMENT'));
      expect(() => readMoments(folder)).toThrow(failure('ERR_INNERKV_INVALID_ARGUMENT'));
      const bytes = encodeMoments(moments);
      writeFileSync(path, bytes);
      expect(readMoments(path)).toEqual(moments);
      for (const length of [0, 4, 100, bytes.length - 1]) {
        writeFileSync(path, bytes.subarray(0, length));
        expect(() => readMoments(path)).toThrow(corrupt(path));
      }
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
});
