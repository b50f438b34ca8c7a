/**
 * Checkpoints of llama2.c, in their first form: seven int32 (hidden, intermediate, layers, query heads, KV heads,
 * vocabulary, context; a negative vocabulary says that the head is a tensor of its own), then float32 tensors, each kind
 * for all layers at once, then two tables of sines and cosines that nobody needs.
 */
import { Cursor, type Source } from './bytes';
import { checkConfig, type ModelConfig } from './config';
import {
  canonicalTensors,
  checkTensors,
  corrupt,
  expectedShapes,
  type CanonicalName,
  type LayerTensor,
  type TensorInfo,
} from './tensors';

const HEADER = 7 * 4;
const order: readonly (LayerTensor | 'embed')[] = [
  'embed', 'attnNorm', 'q', 'k', 'v', 'o', 'ffnNorm', 'gate', 'down', 'up',
]; // prettier-ignore

export function llama2cModel(source: Source): {
  config: ModelConfig;
  tensors: ReadonlyMap<CanonicalName, TensorInfo>;
} {
  const { path, size } = source;
  if (size < HEADER) throw corrupt(path, `${size} bytes are too few for a llama2.c checkpoint`);
  const cursor = new Cursor(source);
  const [hidden, intermediate, layers, queryHeads, kvHeads, vocabulary, contextLength] = Array.from(
    { length: 7 },
    () => cursor.i32(),
  ) as [number, number, number, number, number, number, number];
  const headDim = hidden / queryHeads;
  const config = checkConfig(path, {
    architecture: 'llama',
    layers,
    hidden,
    intermediate,
    queryHeads,
    kvHeads,
    headDim,
    vocabulary: Math.abs(vocabulary),
    contextLength,
    rmsEpsilon: 1e-5,
    rope: { base: 10000, layout: 'adjacent' },
    qkNorm: false,
    attentionBias: false,
    tiedHead: vocabulary > 0,
    bos: 1,
    eos: [1, 2], // texts follow one another with BOS alone
  });

  const shapes = expectedShapes(config);
  const stored: TensorInfo[] = [];
  let at = HEADER;
  const put = (name: CanonicalName) => {
    const shape = shapes.get(name)!;
    const bytes = 4 * shape.reduce((product, extent) => product * extent, 1);
    stored.push({ name, type: 'F32', shape, path, offset: at, bytes });
    at += bytes;
  };
  for (const name of order)
    if (name === 'embed') put(name);
    else for (let i = 0; i < layers; i++) put(`layers.${i}.${name}`);
  put('norm');
  at += 4 * contextLength * headDim;
  if (!config.tiedHead) put('head');
  if (at !== size) throw corrupt(path, `its header asks for ${at} bytes, but it has ${size}`);

  const tensors = canonicalTensors(path, stored, (name) => name as CanonicalName);
  checkTensors(path, config, tensors);
  return { config, tensors };
}
