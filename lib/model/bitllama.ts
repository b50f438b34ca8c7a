/**
 * Ternary checkpoints in the manner of llama2.c: "ak42", version 1, the seven int32 of llama2.c, a byte that is 1 for a tied head,
 * zeros to 256 bytes; float32 weights of the last norm and the embedding; then for each kind of matrix, layer by layer, a
 * float32 scale and codes of 2 bits. The input of every product is x / (|x| √n), n its length: RMSNorm without weights, times 1/n,
 * which is put into the scale.
 */
import { Cursor, type Source } from './bytes';
import { checkConfig, type ModelConfig } from './config';
import {
  canonicalTensors,
  checkTensors,
  corrupt,
  expectedShapes,
  storedBytes,
  unsupported,
  type CanonicalName,
  type LayerTensor,
  type TensorInfo,
} from './tensors';

export const VERSIONED_MAGIC = 0x616b3432;
const HEADER = 256;
const matrices: readonly LayerTensor[] = ['q', 'k', 'v', 'o', 'gate', 'down', 'up'];

export function bitllamaModel(source: Source): {
  config: ModelConfig;
  tensors: ReadonlyMap<CanonicalName, TensorInfo>;
} {
  const { path, size } = source;
  if (size < HEADER) throw corrupt(path, `${size} bytes are too few for a versioned llama2.c checkpoint`);
  const cursor = new Cursor(source, 4);
  const version = cursor.i32();
  if (version !== 1) throw unsupported(path, `it is a llama2.c checkpoint of version ${version}`);
  const [hidden, intermediate, layers, queryHeads, kvHeads, vocabulary, contextLength] = Array.from(
    { length: 7 },
    () => cursor.i32(),
  ) as [number, number, number, number, number, number, number];
  const tied = cursor.u8();
  if (tied > 1) throw corrupt(path, `the flag of its head is ${tied}, neither 0 nor 1`);
  const config = checkConfig(path, {
    architecture: 'llama',
    layers,
    hidden,
    intermediate,
    queryHeads,
    kvHeads,
    headDim: hidden / queryHeads,
    vocabulary,
    contextLength,
    rmsEpsilon: 1e-5,
    rope: { base: 10000, layout: 'adjacent' },
    bareNorms: true,
    qkNorm: false,
    attentionBias: false,
    tiedHead: true,
    bos: 1,
    eos: [1, 2],
  });

  const shapes = expectedShapes(config);
  const stored: TensorInfo[] = [];
  let at = HEADER;
  const put = (name: CanonicalName, type: 'F32' | 'TERNARY') => {
    const shape = shapes.get(name)!;
    const bytes = storedBytes(type, shape);
    if (bytes === undefined)
      throw unsupported(path, `its ternary rows of ${shape.at(-1)!} numbers are no multiples of 32`);
    if (type === 'TERNARY') at += 4;
    stored.push({ name, type, shape, path, offset: at, bytes });
    at += bytes;
  };
  put('norm', 'F32');
  put('embed', 'F32');
  for (const name of matrices) for (let i = 0; i < layers; i++) put(`layers.${i}.${name}`, 'TERNARY');
  if (size === HEADER + float32Bytes(config, tied === 1))
    throw unsupported(path, 'it is a llama2.c checkpoint of version 1 in float32');
  if (tied !== 1) throw unsupported(path, 'it is a ternary checkpoint with a head of its own');
  if (at !== size)
    throw corrupt(path, `its header asks for ${at} bytes of ternary weights, but it has ${size}`);

  const scaled = stored.map((tensor): TensorInfo => {
    if (tensor.type === 'F32') return tensor;
    const bytes = source.read(tensor.offset - 4, 4);
    const scale = new DataView(bytes.buffer, bytes.byteOffset, 4).getFloat32(0, true);
    if (!Number.isFinite(scale)) throw corrupt(path, `the scale of ${tensor.name} is ${scale}`);
    return { ...tensor, scale: scale / tensor.shape.at(-1)! };
  });
  const tensors = canonicalTensors(path, scaled, (name) => name as CanonicalName);
  checkTensors(path, config, tensors);
  return { config, tensors };
}

/** What the same model would take in float32, with weights of all norms. */
function float32Bytes(config: ModelConfig, tied: boolean): number {
  const { bareNorms: _, ...usual } = config;
  const shapes = expectedShapes({ ...usual, tiedHead: tied });
  return [...shapes.values()].reduce((sum, shape) => sum + 4 * shape.reduce((a, b) => a * b, 1), 0);
}
