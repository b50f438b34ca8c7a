/** AbortSignals on their way to native work. */
import { binding, type NativeAbortFlag } from './binding';
import { hasCode, KvError } from './errors';

/** Options of every call that may wait. */
export interface AbortOptions {
  /**
   * Aborts the call: before it is queued, before it starts, and while attention is computed. The promise rejects with
   * the signal's reason and nothing has changed. A started append is finished.
   */
  readonly signal?: AbortSignal;
}

/** Throws the reason of an aborted signal. */
export function throwIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted) throw reasonOf(signal);
}

function reasonOf(signal: AbortSignal): unknown {
  return signal.reason ?? new KvError('ERR_INNERKV_ABORTED', 'The call was aborted.');
}

/** Runs an asynchronous native call under a signal. */
export async function abortable<T>(
  signal: AbortSignal | undefined,
  start: (flag: NativeAbortFlag | undefined) => T | Promise<T>,
): Promise<T> {
  if (!signal) return await start(undefined);
  throwIfAborted(signal);
  const flag = new (binding().AbortFlag)();
  const abort = () => flag.set();
  signal.addEventListener('abort', abort, { once: true });
  try {
    return await start(flag);
  } catch (error) {
    // The listener may not have run yet when a reason set by the same turn of the loop got here first.
    throw hasCode(error, 'ERR_INNERKV_ABORTED') ? reasonOf(signal) : error;
  } finally {
    signal.removeEventListener('abort', abort);
  }
}
