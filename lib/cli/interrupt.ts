/** Ctrl-C as an AbortSignal: work under way ends and is cleaned up; a second Ctrl-C ends the process at once. */
import { KvError } from '../errors';

export function interruptible(): { readonly signal: AbortSignal } & Disposable {
  const controller = new AbortController();
  const abort = () => controller.abort(new KvError('ERR_INNERKV_ABORTED', 'Interrupted.'));
  process.once('SIGINT', abort);
  return {
    signal: controller.signal,
    [Symbol.dispose]: () => void process.removeListener('SIGINT', abort),
  };
}
