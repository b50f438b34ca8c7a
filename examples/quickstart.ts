// A cache with 4-bit keys and 2-bit values: append a token, attend over everything so far, see what it costs.
// Run: npx ts-node --transpile-only examples/quickstart.ts
import { createBackend, KvCache, schemes } from '../lib'; // in a project of your own: from 'innerkv'

const random = (count: number) => Float32Array.from({ length: count }, () => Math.random() - 0.5);

async function main(): Promise<void> {
  using backend = await createBackend();
  const scheme = schemes.rotated({ keyBits: 4, valueBits: 2 });
  const shape = { layers: 1, queryHeads: 8, kvHeads: 2, headDim: 64 };
  using cache = await KvCache.create(backend, { ...shape, scheme, memory: '64MiB' });
  using sequence = cache.sequence();
  for (let token = 0; token < 1000; token++) {
    await sequence.append(0, random(2 * 64), random(2 * 64)); // keys and values of one token, [kvHeads, headDim]
    const out = await sequence.attend(0, random(8 * 64)); // its queries, [queryHeads, headDim]
    if (token === 999) console.log(`${out.length} outputs, ${cache.stats().usedBytes} bytes for 1000 tokens`);
  }
}

void main();
