/** Small random models, written to a file as the runner maps it, and read back for the reference. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type CanonicalName, type ModelConfig, type TensorInfo, type TensorType } from '../../lib/model';
import { expectedShapes } from '../../lib/model/tensors';
import { ropeFrequencies } from '../../lib/schemes/rope';
import { blocks, dequantise } from '../reference/dequantise';
import { toHalfBits } from '../reference/half';
import { type LlamaShape, type LlamaTensor } from '../reference/llama';
import { Random } from './random';

export interface RandomModel {
  readonly config: ModelConfig;
  readonly tensors: Map<CanonicalName, TensorInfo>;
  readonly path: string;
  readonly shape: LlamaShape;
  tensor(name: string): LlamaTensor | undefined;
}

const folders: string[] = [];

export function removeModels(): void {
  for (const folder of folders.splice(0)) rmSync(folder, { recursive: true });
}

export function temporaryFile(name: string): string {
  const folder = mkdtempSync(join(tmpdir(), 'innerkv-model-'));
  folders.push(folder);
  return join(folder, name);
}

export function modelConfig(changes: Partial<ModelConfig> = {}): ModelConfig {
  return {
    architecture: 'llama',
    layers: 2,
    hidden: 96,
    intermediate: 160,
    queryHeads: 4,
    kvHeads: 2,
    headDim: 64,
    vocabulary: 40,
    contextLength: 512,
    rmsEpsilon: 1e-5,
    rope: { base: 10000, layout: 'adjacent' },
    qkNorm: false,
    attentionBias: false,
    tiedHead: false,
    eos: [],
    ...changes,
  };
}

/** Weights with a standard deviation of about `spread` as bytes of a type; magnitude as in the reference. */
function randomWeights(random: Random, type: TensorType, count: number, spread: number, center = 0) {
  const { values, bytes: size } = blocks[type];
  const bytes = new Uint8Array((count / values) * size).map(() => random.below(256));
  let magnitude = 0;
  for (let at = 0; at < bytes.length; at += size) {
    const view = new DataView(bytes.buffer, at, size);
    const half = (place: number, value: number) => view.setUint16(place, toHalfBits(value), true);
    const factor = spread * (0.5 + random.below(1000) / 1000);
    const reach = (value: number) => (magnitude = Math.max(magnitude, value));
    const affine = (levels: number, minimum?: number) => {
      const d = (factor * 3.46) / levels; // a uniform code of n levels has a standard deviation of n / sqrt(12)
      half(0, d);
      if (minimum !== undefined) half(2, -d * minimum);
      reach(d * 1.01 * 1.5 * levels);
    };
    if (type === 'F32') view.setFloat32(0, center + spread * random.gaussian(), true);
    else if (type === 'F16') half(0, center + spread * random.gaussian());
    else if (type === 'BF16') {
      const scratch = new DataView(new ArrayBuffer(4));
      scratch.setFloat32(0, center + spread * random.gaussian());
      view.setUint16(0, scratch.getUint16(0), true);
    } else if (type === 'TERNARY') reach(5 * spread);
    else if (type === 'Q8_0') affine(256);
    else if (type === 'Q4_0') affine(16);
    else if (type === 'Q4_1') affine(16, 7.5);
    else if (type === 'Q5_0') affine(32);
    else if (type === 'Q5_1') affine(32, 15.5);
    else if (type === 'Q4_K') {
      const d = factor / (32 * 4.6);
      half(0, d);
      half(2, 7.5 * d);
      reach(1.01 * 63 * (15 + 7.5) * d);
    } else {
      const d = factor / (74 * 18.5);
      half(208, d);
      reach(1.01 * 128 * (63 + 32) * d);
    }
  }
  return { bytes, magnitude };
}

/** Norms scatter around 1; matrices keep the size of what they multiply. */
export function randomModel(config: ModelConfig, type: TensorType = 'F32', seed = 1): RandomModel {
  const random = new Random(seed);
  const path = temporaryFile('weights.bin');
  const tensors = new Map<CanonicalName, TensorInfo>();
  const magnitudes = new Map<string, number>();
  const pieces: Uint8Array[] = [];
  let offset = 0;
  for (const [name, shape] of expectedShapes(config)) {
    const matrix = shape.length > 1;
    const stored = matrix ? type : 'F32';
    const count = shape.reduce((a, b) => a * b, 1);
    const spread = matrix ? (name === 'embed' ? 1 : 1 / Math.sqrt(shape[1]!)) : 0.3;
    const { bytes, magnitude } = randomWeights(
      random,
      stored,
      count,
      spread,
      /Norm$|norm$/.test(name) ? 1 : 0,
    );
    // Files align tensors loosely, so every other one lies crookedly.
    const gap = tensors.size % 2 ? 2 : 32;
    tensors.set(name, {
      ...{ name, type: stored, shape, path, offset: offset + gap, bytes: bytes.length },
      ...(stored === 'TERNARY' && { scale: spread }),
    });
    magnitudes.set(name, magnitude);
    pieces.push(new Uint8Array(gap), bytes);
    offset += gap + bytes.length;
  }
  writeFileSync(path, Buffer.concat(pieces));
  const file = readFileSync(path);
  const decoded = new Map<string, LlamaTensor>();
  return {
    config,
    tensors,
    path,
    shape: {
      ...config,
      epsilon: config.rmsEpsilon,
      theta: ropeFrequencies(config.rope, config.headDim),
      layout: config.rope.layout,
    },
    tensor: (name) => {
      const info = tensors.get(name as CanonicalName);
      if (!info) return undefined;
      const known = decoded.get(name) ?? {
        values: dequantise(info.type, file.subarray(info.offset, info.offset + info.bytes)).map(
          (value) => value * Math.fround(info.scale ?? 1),
        ),
        magnitude: magnitudes.get(name)!,
      };
      decoded.set(name, known);
      return known;
    },
  };
}
