/**
 * What a calibrated basis of the values would gain: v' = T v is what is stored, and the output is multiplied by T⁻¹. Folded into
 * the weights (Wv' = T Wv, Wo' = Wo T⁻¹) it is the same model with the same cache schemes, so no format has to know of it.
 */
import { EigenvalueDecomposition, Matrix, inverse } from 'ml-matrix';
import { closeSync, openSync, readSync, writeFileSync } from 'node:fs';
import { type Backend } from '../../lib/backend';
import { Model, type CanonicalName, type ModelFile, type TensorInfo } from '../../lib/model';
import { schemes } from '../../lib/schemes';
import { dequantise } from '../../test/reference/dequantise';

export const valueBases = {
  none: 'as it is',
  diagonal: 'channels divided by the root of their standard deviation',
  matrix: 'S^(-1/4) with S the second moment of the values',
  output: 'the geometric mean of S^(-1) and the metric of the output projection, square root',
} as const;
export type ValueBasis = keyof typeof valueBases;

const RIDGE = 0.02;
const SKIP = 4;

/** f of a symmetric matrix: f of its eigenvalues, which stay above a share of their mean. */
function power(matrix: Matrix, exponent: number): Matrix {
  const { realEigenvalues, eigenvectorMatrix: E } = new EigenvalueDecomposition(matrix, {
    assumeSymmetric: true,
  });
  const mean = realEigenvalues.reduce((a, b) => a + b, 0) / realEigenvalues.length;
  const scaled = realEigenvalues.map((value) => (Math.max(0, value) + RIDGE * mean) ** exponent);
  return E.mmul(Matrix.diag(scaled)).mmul(E.transpose());
}

function basisOf(kind: ValueBasis, S: Matrix, output: Matrix): Matrix {
  const n = S.rows;
  if (kind === 'none') return Matrix.eye(n);
  if (kind === 'diagonal') return power(Matrix.diag(S.diagonal()), -0.25);
  if (kind === 'matrix') return power(S, -0.25);
  const [root, back] = [power(S, 0.5), power(S, -0.5)];
  return power(back.mmul(power(root.mmul(output).mmul(root), 0.5)).mmul(back), 0.5);
}

/** Second moments of the values per layer and KV head over a text, sinks left out. */
export async function valueMoments(model: Model, tokens: Int32Array): Promise<Matrix[][]> {
  const { layers, kvHeads, headDim } = model.config;
  using cache = await model.createCache({ scheme: schemes.fp16(), memory: '1GiB' });
  using sequence = cache.sequence();
  await model.forward(sequence, tokens, { activations: 'float32', logits: 'none' });
  const momentOf = (layer: number, head: number) => {
    const { v } = sequence.readBackSync(layer, head);
    const rows = v.length / tokens.length;
    const values = new Matrix(tokens.length - SKIP, headDim);
    for (let t = SKIP; t < tokens.length; t++)
      for (let c = 0; c < headDim; c++) values.set(t - SKIP, c, v[t * rows + c]!);
    return values.transpose().mmul(values).div(values.rows);
  };
  return Array.from({ length: layers }, (_, layer) =>
    Array.from({ length: kvHeads }, (_, head) => momentOf(layer, head)),
  );
}

function read({ path, offset, bytes, type, shape }: TensorInfo): Matrix {
  const data = Buffer.alloc(bytes);
  const file = openSync(path, 'r');
  try {
    readSync(file, data, 0, bytes, offset);
  } finally {
    closeSync(file);
  }
  return Matrix.from1DArray(shape[0]!, shape[1]!, dequantise(type, data));
}

/** The model with its values in another basis; the weights that change are written to `path` in float32. */
export function inValueBasis(
  backend: Backend,
  file: ModelFile,
  kind: ValueBasis,
  moments: readonly (readonly Matrix[])[],
  path: string,
): Model {
  const { layers, kvHeads, queryHeads, headDim: D } = file.config;
  const group = queryHeads / kvHeads;
  const tensors = new Map(file.tensors);
  const pieces: Buffer[] = [];
  let offset = 0;
  const put = (name: CanonicalName, matrix: Matrix) => {
    const data = Buffer.from(Float32Array.from(matrix.to1DArray()).buffer);
    const shape = [matrix.rows, matrix.columns];
    tensors.set(name, { name, type: 'F32', shape, path, offset, bytes: data.length });
    pieces.push(data);
    offset += data.length;
  };
  for (let layer = 0; layer < layers; layer++) {
    const [v, o] = [read(tensors.get(`layers.${layer}.v`)!), read(tensors.get(`layers.${layer}.o`)!)];
    for (let head = 0; head < kvHeads; head++) {
      const columns = Array.from({ length: group }, (_, i) => {
        const first = (head * group + i) * D;
        return { first, part: o.subMatrix(0, o.rows - 1, first, first + D - 1) };
      });
      const output = Matrix.zeros(D, D);
      for (const { part } of columns) output.add(part.transpose().mmul(part));
      const T = basisOf(kind, moments[layer]![head]!, output);
      v.setSubMatrix(T.mmul(v.subMatrix(head * D, head * D + D - 1, 0, v.columns - 1)), head * D, 0);
      const back = inverse(T);
      for (const { first, part } of columns) o.setSubMatrix(part.mmul(back), 0, first);
    }
    put(`layers.${layer}.v`, v);
    put(`layers.${layer}.o`, o);
  }
  writeFileSync(path, Buffer.concat(pieces));
  const { config, name, tokenizer } = file;
  return Model.openSync(backend, { config, tensors, name, tokenizer }, { activations: 'float32' });
}
