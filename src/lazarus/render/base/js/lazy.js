/* Nothing is drawn before the page has been painted, and no plot before it is near. */

const MARGIN = "400px";
const pending = new Set();

/** After the browser has painted what it has. */
const afterPaint = (work) => requestAnimationFrame(() => setTimeout(work, 0));

/** Once, when the element comes near the window, or the page is printed. */
function whenNear(target, work) {
  const once = () => {
    if (!pending.delete(once)) return;
    observer.disconnect();
    work();
  };
  const observer = new IntersectionObserver(
    (entries) => entries.some((entry) => entry.isIntersecting) && once(),
    { rootMargin: MARGIN },
  );
  pending.add(once);
  observer.observe(target);
}

window.addEventListener("beforeprint", () => [...pending].forEach((work) => work()));
