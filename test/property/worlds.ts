/** Small caches for random operations: two layers of different schemes, and a budget that a few sequences use up. */
import { type KvCache } from '../../lib';
import { type HeadScheme } from '../reference/cache';
import { backendOf, createCache } from '../support/native';
import { attentionFamilies, calibratedHeads, innerq, rotatedHeads } from '../support/treatments';

export interface World {
  readonly name: string;
  /** [layers][kvHeads] */
  readonly layers: readonly (readonly HeadScheme[])[];
  readonly memory: number;
}

export const GROUP = 2;
const D = 64;

const family = (name: string) => attentionFamilies.find((known) => known.name === name)!.heads(D);
const one = (heads: readonly HeadScheme[]) => heads.slice(0, 1);
const raw = (sink: number, recent: number): readonly HeadScheme[] => [
  { ...family('16/16')[0]!, sink, recent },
];

export const worlds: readonly World[] = [
  { name: '16 bits', layers: [raw(0, 0), raw(3, 5)], memory: 250_000 },
  {
    name: 'calibrated, asymmetric',
    layers: [one(calibratedHeads(2, 2, 'half', { sink: 2, recent: 3 })(D)), one(family('asymmetric 4/2'))],
    memory: 50_000,
  },
  {
    name: 'rotated with statistics, InnerQ hybrid',
    layers: [
      one(rotatedHeads(4, 2)(D)),
      one(
        innerq(
          { bits: 3, group: 'channels32', mode: 'hybrid' },
          { bits: 2, group: 'tokens32', mode: 'hybrid' },
        )(D),
      ),
    ],
    memory: 60_000,
  },
  {
    name: 'two KV heads: rotated 3/3, tokens32 in a Hadamard basis',
    layers: [
      rotatedHeads(3, 3, { sink: 0, recent: 0, statTokens: 1 })(D),
      [0, 1].map(() => ({
        headDim: D,
        key: { bits: 4, group: 'token', mode: 'midRise' } as const,
        value: { bits: 4, group: 'tokens32', mode: 'zeroLevel' } as const,
        sink: 1,
        recent: 4,
        valueHadamard: true,
      })),
    ],
    memory: 110_000,
  },
  {
    name: 'outliers: rotated 2/2, asymmetric 4/3 in short windows',
    layers: [
      one(
        rotatedHeads(2, 2, {
          key: { bits: 2, group: 'token', mode: 'midRise', outliers: 2 },
          value: { bits: 2, group: 'token', mode: 'midRise', outliers: 1 },
          statTokens: 10,
        })(D),
      ),
      [
        {
          headDim: D,
          key: { bits: 4, group: 'channels32', mode: 'asymmetric', outliers: 1 },
          value: { bits: 3, group: 'channels64', mode: 'signedMax', outliers: 8 },
          sink: 1,
          recent: 2,
        },
      ],
    ],
    memory: 60_000,
  },
];

export function cacheOf({ layers, memory }: World): KvCache {
  return createCache(backendOf('', 1), { heads: layers, group: GROUP, memory });
}
