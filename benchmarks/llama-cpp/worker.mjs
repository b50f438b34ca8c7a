/**
 * llama.cpp for `npm run bench -- model --peer …`: a process that opens a model with one type of cache and then prefills
 * and decodes on demand. Messages: { method, argument } in, { result } or { error } out.
 */
import { readFileSync } from 'node:fs';
import { getLlama } from 'node-llama-cpp';

const { dependencies } = JSON.parse(readFileSync(new URL('package.json', import.meta.url), 'utf8'));
let sequence;

/** As in ../model/contender.ts. */
function stopwatch() {
  const [started, before] = [performance.now(), process.cpuUsage()];
  return () => {
    const { user, system } = process.cpuUsage(before);
    return { seconds: (performance.now() - started) / 1000, processorSeconds: (user + system) / 1e6 };
  };
}

const methods = {
  async open({ model: modelPath, type, threads, contextSize, chunk }) {
    const llama = await getLlama({ gpu: false, build: 'never', maxThreads: 0, logLevel: 'error' });
    const model = await llama.loadModel({ modelPath });
    const cacheType = type.toUpperCase();
    const context = await model.createContext({
      contextSize,
      batchSize: chunk,
      threads,
      flashAttention: true,
      experimentalKvCacheKeyType: cacheType,
      experimentalKvCacheValueType: cacheType,
    });
    sequence = context.getSequence();
    return {
      name: 'node-llama-cpp',
      version: dependencies['node-llama-cpp'],
      flashAttention: context.flashAttention,
      threads: context.currentThreads,
      systemInfo: llama.systemInfo,
    };
  },

  async prefill(tokens) {
    const elapsed = stopwatch();
    await sequence.evaluateWithoutGeneratingNewTokens(tokens);
    return elapsed();
  },

  async decode({ token, count }) {
    const start = sequence.nextTokenIndex;
    const steps = [];
    let elapsed = stopwatch();
    for await (const _ of sequence.evaluate([token], { temperature: 0, yieldEogToken: true })) {
      steps.push(elapsed());
      if (steps.length === count) break;
      elapsed = stopwatch();
    }
    await sequence.eraseContextTokenRanges([{ start, end: sequence.nextTokenIndex }]);
    if (steps.length < count) throw new Error(`Decoding ended after ${steps.length} tokens.`);
    return steps;
  },
};

process.on('message', async ({ method, argument }) => {
  try {
    process.send({ result: await methods[method](argument) });
  } catch (error) {
    process.send({ error: error?.stack ?? String(error) });
  }
});
