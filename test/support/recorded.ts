/** Activations recorded from a real model, found through INNERKV_DATA; tests that lack them say so. */
import { existsSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { readMoments, selectLayers, type CacheShape, type Moments } from '../../lib';
import { decodeFloats, readSafetensors } from '../../lib/schemes/safetensors';

export const dataFolder = resolve(
  process.env.INNERKV_DATA ?? join(__dirname, '..', '..', '..', 'shared', 'data'),
);

/** `describe`, or a loud skip where a file is missing. */
export function describeWith(files: readonly string[], name: string, body: () => void): void {
  const missing = files.filter((file) => !existsSync(join(dataFolder, file)));
  if (missing.length === 0) {
    describe(name, body);
    return;
  }
  process.stderr.write(`*** SKIPPED ${name}: ${missing.join(', ')} not in ${dataFolder} (INNERKV_DATA)\n`);
  describe.skip(name, body);
}

export interface RecordedTensors {
  /** [tokens, heads, headDim], after RoPE. */
  readonly q: Float32Array;
  readonly k: Float32Array;
  readonly v: Float32Array;
}

export interface Recorded {
  readonly tokens: number;
  readonly shape: CacheShape;
  readonly layers: readonly RecordedTensors[];
  /** Of another text, layers renumbered like `layers`. */
  readonly moments: Moments;
}

export const RECORDING = 'activations/smollm2_4layers_2048.safetensors';
export const MOMENTS = 'activations/smollm2_moments_wiki2048.safetensors';

/** Four whole layers of SmolLM2-135M over 2,048 tokens. */
export function readRecorded(): Recorded {
  const file = readSafetensors(join(dataFolder, RECORDING));
  const numbers = [0, 9, 19, 29];
  const read = (layer: number, name: string) => {
    const tensor = file.tensors.get(`layers.${layer}.${name}`)!;
    return { shape: tensor.shape, data: Float32Array.from(decodeFloats(tensor)!) };
  };
  const [tokens, queryHeads, headDim] = read(0, 'query').shape as [number, number, number];
  const [, kvHeads] = read(0, 'key').shape as [number, number, number];
  return {
    tokens,
    shape: {
      layers: numbers.length,
      queryHeads,
      kvHeads,
      headDim,
      rope: { base: 100000, layout: 'adjacent' },
    },
    layers: numbers.map((layer) => ({
      q: read(layer, 'query').data,
      k: read(layer, 'key').data,
      v: read(layer, 'value').data,
    })),
    moments: selectLayers(readMoments(join(dataFolder, MOMENTS)), numbers),
  };
}
