/** Recording a model's moments, which calibrate its schemes, while it runs. */
import { abortable, type AbortOptions } from '../abort';
import { type NativeMoments, type NativeMomentSums } from '../binding';
import { invalid } from '../errors';
import { Lifetime, Owned } from '../lifetime';
import { type HeadMoments, type Moments, type MomentsOrigin } from '../schemes/moments';
import { type Model } from './runner';

/** Moments that know their model, so that no other model's cache takes them. */
export type RecordedMoments = Moments & { readonly tokens: number; readonly origin: MomentsOrigin };

/** Sums over observed tokens; made by Model.moments(). Disposed with its model. */
export class MomentsRecorder extends Owned<NativeMoments> {
  /** @internal */
  readonly life: Lifetime<NativeMoments>;
  private readonly shape: { readonly kvHeads: number; readonly headDim: number; readonly group: number };

  /** @internal */
  constructor(
    private readonly model: Model,
    native: NativeMoments,
  ) {
    super();
    this.life = new Lifetime(this, 'moments', native, model.life);
    const { kvHeads, headDim, queryHeads } = model.config;
    this.shape = { kvHeads, headDim, group: queryHeads / kvHeads };
  }

  /** The moments of everything observed so far, for schemes.calibrated(). Throws when nothing was. */
  async read(options: AbortOptions = {}): Promise<RecordedMoments> {
    return this.momentsOf(await abortable(options.signal, (flag) => this.life.use().read(false, flag)));
  }

  readSync(): RecordedMoments {
    return this.momentsOf(this.life.use().read(true, undefined) as NativeMomentSums);
  }

  private momentsOf({ tokens, queryTokens, keySum, keySquare, querySquare }: NativeMomentSums) {
    if (tokens === 0) throw invalid('No token was observed yet.');
    const { kvHeads, headDim, group } = this.shape;
    const square = headDim ** 2;
    const mean = (sums: Float64Array, head: number, size: number, count: number) =>
      sums.slice(head * size, (head + 1) * size).map((sum) => sum / count);
    const layers = keySum.length / kvHeads / headDim;
    const headAt = (head: number): HeadMoments => ({
      keyMean: mean(keySum, head, headDim, tokens),
      keyMoment: mean(keySquare, head, square, tokens),
      queryMoment: mean(querySquare, head, square, queryTokens * group),
    });
    const heads = (layer: number) => Array.from({ length: kvHeads }, (_, i) => headAt(layer * kvHeads + i));
    const { name, fingerprint: of } = this.model.identity;
    return {
      kvHeads,
      headDim,
      tokens,
      origin: { model: name, fingerprint: of, rope: this.model.config.rope, tokens },
      layers: new Map(Array.from({ length: layers }, (_, layer) => [layer, heads(layer)])),
    };
  }
}
