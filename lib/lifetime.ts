/** Who lives how long: disposal from parent to child, use after dispose, and what was forgotten. */
import { KvError } from './errors';

/** The native half of an object. */
export interface NativeResource {
  dispose(): void;
}

/**
 * The life of one object, apart from the object itself: children are reached through it without keeping the objects
 * that users see alive, so that forgotten ones can be collected, and then disposed by the registry below.
 */
export class Lifetime<Native extends NativeResource = NativeResource> {
  private readonly children = new Set<Lifetime>();
  private native: Native | undefined;
  readonly stack: string | undefined;

  /** `owner` is the object that users hold; it must not be reachable from `native`. */
  constructor(
    owner: object,
    readonly kind: string,
    native: Native,
    private readonly parent?: Lifetime,
  ) {
    this.native = native;
    if (reportsLeaks()) this.stack = new Error(`${kind} was created here`).stack;
    parent?.children.add(this);
    forgotten.register(owner, this, this);
  }

  get disposed(): boolean {
    return this.native === undefined;
  }

  get childCount(): number {
    return this.children.size;
  }

  /** The native object; throws after dispose(). */
  use(): Native {
    if (this.native === undefined)
      throw new KvError('ERR_INNERKV_DISPOSED', `This ${this.kind} was disposed.`, {
        details: { object: this.kind },
      });
    return this.native;
  }

  /** Idempotent. Children go first. Calls under way finish; they hold what they need. */
  dispose(): void {
    if (this.native === undefined) return;
    for (const child of [...this.children]) child.dispose();
    const native = this.native;
    this.native = undefined;
    this.parent?.children.delete(this);
    forgotten.unregister(this);
    native.dispose();
  }
}

function reportsLeaks(): boolean {
  return process.env.INNERKV_DEBUG_LEAKS === '1';
}

let reported = false;

/** Disposes what was collected without dispose(); with INNERKV_DEBUG_LEAKS=1 one warning says where it was made. */
const forgotten = new FinalizationRegistry<Lifetime>((lifetime) => {
  if (lifetime.disposed) return;
  if (reportsLeaks() && !reported) {
    reported = true;
    process.emitWarning(
      `A ${lifetime.kind} was collected without dispose(). ${lifetime.stack ?? ''}`,
      'InnerKvLeakWarning',
    );
  }
  lifetime.dispose();
});

/** Base of everything that is disposed by hand, by `using`, or with its parent. */
export abstract class Owned<Native extends NativeResource> {
  /** @internal */
  protected abstract readonly life: Lifetime<Native>;

  get disposed(): boolean {
    return this.life.disposed;
  }

  /** Frees native memory. Idempotent; calls under way finish and settle. Using the object afterwards throws. */
  dispose(): void {
    this.life.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}
