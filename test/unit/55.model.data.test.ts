/** Real models and vocabularies: the known configuration, ids that others computed, token counts that others published. */
import { readFileSync } from 'node:fs';
import { openModel } from '../../lib/model';
import { withFile } from '../../lib/model/bytes';
import { parseGguf } from '../../lib/model/gguf';
import { ggufTokenizer } from '../../lib/model/vocabulary';
import { readSafetensors } from '../../lib/schemes/safetensors';
import { mergeByScore } from '../reference/sentencepiece';
import { dataPath, describeWithData } from '../support/data';
import { failure } from '../support/failures';
import { Random } from '../support/random';

const smollm2 = 'models/smollm2-135m/smollm2-135m-instruct.q4_1.gguf';
const wikitext = 'texts/wikitext-2-raw/wikitext2-test-joined.txt';
const textOf = (path: string) => readFileSync(dataPath(path), 'utf8');

describeWithData('SmolLM2-135M', [smollm2], () => {
  const model = openModel(dataPath(smollm2));

  test('is what it is known to be', () => {
    expect(model.config).toEqual({
      ...{ architecture: 'llama', layers: 30, hidden: 576, intermediate: 1536, queryHeads: 9, kvHeads: 3, headDim: 64 },
      ...{ vocabulary: 49152, contextLength: 8192, rmsEpsilon: Math.fround(1e-5) },
      rope: { base: 100000, layout: 'adjacent' },
      ...{ qkNorm: false, attentionBias: false, tiedHead: true, bos: 1, eos: [2, 0] },
    });
    expect(model.tensors.size).toBe(272);
    const parameters = [...model.tensors.values()].reduce((sum, { shape }) => sum + shape.reduce((a, b) => a * b, 1), 0);
    expect(parameters).toBe(134_515_008);
    expect(model.tensors.get('embed')).toMatchObject({ type: 'Q8_0', shape: [49152, 576] });
    expect(model.tensors.get('layers.29.k')).toMatchObject({ type: 'Q4_1', shape: [192, 576] });
    expect(model.tensors.get('norm')!.type).toBe('F32');
  });

  test('writes a chat as its template says, in its own control tokens', () => {
    const text = model.chat!.render([
      { role: 'user', content: 'Hi' },
      { role: 'assistant', content: 'Hello.' },
      { role: 'user', content: 'Why?' },
    ]);
    expect(text).toBe(
      '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' +
        '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n' +
        '<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n',
    );
    const ids = [...model.tokenizer.encode(text, { special: true })];
    expect(ids.filter((id) => id === 1)).toHaveLength(5);
    expect(ids.filter((id) => id === 2)).toHaveLength(4);
    expect(model.chat!.render([{ role: 'system', content: 'S' }], { addGenerationPrompt: false })).toBe('<|im_start|>system\nS<|im_end|>\n');
  });
}); // prettier-ignore

describeWithData('SmolLM2 on WikiText-2', [smollm2, wikitext, 'golden/smollm2_wikitext2.safetensors'], () => {
  test('304,978 tokens, the four golden windows first, and the same text again', () => {
    const { tokenizer } = openModel(dataPath(smollm2));
    const text = textOf(wikitext);
    const ids = tokenizer.encode(text);
    expect(ids).toHaveLength(304_978);
    const golden = readSafetensors(dataPath('golden/smollm2_wikitext2.safetensors')).tensors.get(
      'token_ids',
    )!;
    const windows = new DataView(golden.bytes.buffer, golden.bytes.byteOffset, golden.bytes.byteLength);
    expect(ids.subarray(0, 8192)).toEqual(
      Int32Array.from({ length: 8192 }, (_, i) => windows.getInt32(4 * i, true)),
    );
    expect(tokenizer.decode(ids) === text).toBe(true);
  });
});

/** Inputs between separators, and one line of ids for each. */
function goldenPairs(name: string): [text: string, ids: number[]][] {
  const inputs = textOf(`tokenizers/${name}.inp`).split('\n__ggml_vocab_test__\n');
  const outputs = textOf(`tokenizers/${name}.out`).split('\n');
  return inputs.map((text, i) => [text, outputs[i]!.trim().split(' ').filter(Boolean).map(Number)]);
}

const vocabularies = ['ggml-vocab-gpt-2.gguf', 'ggml-vocab-deepseek-coder.gguf', 'ggml-vocab-llama-spm.gguf'];
const filesOf = (name: string) => ['', '.inp', '.out'].map((suffix) => `tokenizers/${name}${suffix}`);
const vocabulary = (name: string) =>
  withFile(dataPath('tokenizers', name), (source) => ggufTokenizer(parseGguf(source)));

for (const name of vocabularies)
  describeWithData(name, filesOf(name), () => {
    test('gives the ids of the golden file', () => {
      const tokenizer = vocabulary(name);
      const pairs = goldenPairs(name);
      expect(pairs.length).toBeGreaterThan(40);
      for (const [text, ids] of pairs) {
        expect([text, [...tokenizer.encode(text, { bos: false })]]).toEqual([text, ids]);
        expect(tokenizer.decode(ids)).toBe(text);
      }
    });

    test('is no model, for it has no tensors', () => {
      expect(() => openModel(dataPath('tokenizers', name))).toThrow(
        expect.objectContaining({ name: 'KvError' }) as Error,
      );
    });
  });

describeWithData('Llama-2 on WikiText-2', [...filesOf(vocabularies[2]!), wikitext], () => {
  const tokenizer = vocabulary(vocabularies[2]!);
  const text = textOf(wikitext);

  test('341,469 tokens with BOS, and the same text again', () => {
    const ids = tokenizer.encode(text);
    expect(ids).toHaveLength(341_469);
    expect(tokenizer.decode(ids) === text).toBe(true);
  });

  test('merges as the definition does', () => {
    const scores = withFile(dataPath('tokenizers', vocabularies[2]!), parseGguf).metadata.get('tokenizer.ggml.scores') as number[];
    const ids = new Map(Array.from({ length: 32000 - 259 }, (_, i) => [tokenizer.token(259 + i)!, 259 + i]));
    const reference = { ids, scores, bytes: Array.from({ length: 256 }, (_, byte) => 3 + byte) };
    const random = new Random(12);
    for (let round = 0; round < 40; round++) {
      const at = random.below(text.length - 200);
      const part = text.slice(at, at + 20 + random.below(180));
      const expected = mergeByScore(`\u2581${part.replaceAll(' ', '\u2581')}`, reference);
      expect([...tokenizer.encode(part, { bos: false })]).toEqual(expected);
    }
  });
}); // prettier-ignore

describeWithData(
  'stories260K',
  ['models/stories260K/stories260K.bin', 'models/stories260K/tok512.bin'],
  () => {
    test('configuration, vocabulary, size', () => {
      const model = openModel(dataPath('models/stories260K/stories260K.bin'));
      expect(model).toMatchObject({ name: 'stories260K.bin', format: 'llama2.c' });
      expect(model.config).toMatchObject({
        ...{
          layers: 5,
          hidden: 64,
          intermediate: 172,
          queryHeads: 8,
          kvHeads: 4,
          headDim: 8,
          vocabulary: 512,
        },
        ...{ contextLength: 512, rope: { base: 10000, layout: 'adjacent' }, tiedHead: true },
      });
      const text = 'Once upon a time, there was a little girl named Lily.';
      const ids = model.tokenizer.encode(text);
      expect(ids[0]).toBe(1);
      expect(model.tokenizer.decode(ids)).toBe(text);
      const pieces = Array.from({ length: 512 }, (_, id) => model.tokenizer.token(id)!);
      const reference = {
        ids: new Map(pieces.map((piece, id) => [piece, id] as const).slice(259)),
        scores: Float64Array.from(pieces, (_, id) => 259 - id),
        bytes: Array.from({ length: 256 }, (_, byte) => 3 + byte),
      };
      expect([...ids].slice(1)).toEqual(mergeByScore(`\u2581${text.replaceAll(' ', '\u2581')}`, reference));
    });
  },
);

describeWithData('bitllama', ['models/bitllama/bitllama-1M.bin'], () => {
  const path = dataPath('models/bitllama/bitllama-1M.bin');

  test('is what it is known to be', () => {
    const { config, tensors } = openModel(path);
    expect(config).toMatchObject({ layers: 8, hidden: 128, intermediate: 256, queryHeads: 8, kvHeads: 4, headDim: 16 });
    expect(config).toMatchObject({ vocabulary: 512, contextLength: 512, bareNorms: true, tiedHead: true });
    expect(tensors.get('layers.0.q')!.scale).toBe(Math.fround(0.7660588622093201) / 128);
  });

  test('has no tokenizer beside it', () =>
    expect(() => openModel(path).tokenizer).toThrow(failure('ERR_INNERKV_UNSUPPORTED', 'tokenizer')));
}); // prettier-ignore
