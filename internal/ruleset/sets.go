package ruleset

import (
	"bytes"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// What x/sys lacks of linux/netfilter/nf_tables.h.
const (
	setDescConcat   = 2  // NFTA_SET_DESC_CONCAT
	setFieldLen     = 1  // NFTA_SET_FIELD_LEN
	elemKeyEnd      = 10 // NFTA_SET_ELEM_KEY_END
	elemExpressions = 17 // NFTA_SET_ELEM_EXPRESSIONS
	elemCatchAll    = 2  // NFT_SET_ELEM_CATCHALL
)

// set reads a set of a chain's table, with its elements.
func (k kernel) set(c Chain, name string) (s Set, err error) {
	about, err := k.ask(unix.NFT_MSG_GETSET, 0, c.Family, text(unix.NFTA_SET_TABLE, c.Table), text(unix.NFTA_SET_NAME, name))
	if err != nil {
		return Set{}, err
	}
	var flags uint32
	var fields []int
	for _, a := range about {
		each(a[4:], func(typ uint16, b []byte) {
			switch typ {
			case unix.NFTA_SET_FLAGS:
				flags = number(b)
			case unix.NFTA_SET_DESC:
				each(b, func(typ uint16, b []byte) {
					if typ != setDescConcat {
						return
					}
					each(b, func(_ uint16, b []byte) {
						each(b, func(typ uint16, b []byte) {
							if typ == setFieldLen {
								fields = append(fields, int(number(b)))
							}
						})
					})
				})
			}
		})
	}
	answers, err := k.ask(unix.NFT_MSG_GETSETELEM, netlink.Dump, c.Family,
		text(unix.NFTA_SET_ELEM_LIST_TABLE, c.Table), text(unix.NFTA_SET_ELEM_LIST_SET, name))
	if err != nil {
		return Set{}, err
	}
	var els []element
	for _, a := range answers {
		each(a[4:], func(typ uint16, b []byte) {
			if typ == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				each(b, func(_ uint16, b []byte) { els = append(els, readElement(b)) })
			}
		})
	}
	return assemble(els, flags&unix.NFT_SET_INTERVAL != 0, fields), nil
}

// element is one as the kernel has it: of an interval, its first key or the one after its
// last.
type element struct {
	Element
	end, catchAll bool
}

func readElement(data []byte) (el element) {
	value := func(b []byte) (v []byte) {
		each(b, func(typ uint16, b []byte) {
			if typ == unix.NFTA_DATA_VALUE {
				v = b
			}
		})
		return v
	}
	each(data, func(typ uint16, b []byte) {
		switch typ {
		case unix.NFTA_SET_ELEM_KEY:
			el.From = value(b)
		case elemKeyEnd:
			el.To = value(b)
		case unix.NFTA_SET_ELEM_FLAGS:
			el.end = number(b)&unix.NFT_SET_ELEM_INTERVAL_END != 0
			el.catchAll = number(b)&elemCatchAll != 0
		case unix.NFTA_SET_ELEM_EXPR, elemExpressions:
			// A counter is no condition; of several expressions one may be.
			el.Unsure = true
			each(b, func(t uint16, b []byte) {
				if typ == unix.NFTA_SET_ELEM_EXPR && t == unix.NFTA_EXPR_NAME && word(b) == "counter" {
					el.Unsure = false
				}
			})
		case unix.NFTA_SET_ELEM_DATA:
			each(b, func(typ uint16, b []byte) {
				switch typ {
				case unix.NFTA_DATA_VALUE:
					el.Data = b
				case unix.NFTA_DATA_VERDICT:
					el.Verdict = &Verdict{}
					each(b, func(typ uint16, b []byte) {
						switch typ {
						case unix.NFTA_VERDICT_CODE:
							el.Verdict.Kind = int32(number(b))
						case unix.NFTA_VERDICT_CHAIN:
							el.Verdict.Chain = word(b)
						}
					})
				}
			})
		}
	})
	return el
}

// assemble makes a set of its elements as the kernel has them.
func assemble(els []element, interval bool, fields []int) (s Set) {
	var ends []element
	for _, el := range els {
		switch {
		case el.catchAll:
			s.CatchAll = &el.Element
		case interval && el.To == nil && fields == nil:
			ends = append(ends, el)
		default:
			if el.To == nil {
				el.To = el.From
			} else {
				el.Fields = fields
				el.Unsure = el.Unsure || fields == nil
			}
			s.Elements = append(s.Elements, el.Element)
		}
	}
	// Where one interval begins right after another, the end comes first.
	slices.SortStableFunc(ends, func(a, b element) int {
		if c := bytes.Compare(a.From, b.From); c != 0 || a.end == b.end {
			return c
		}
		if a.end {
			return -1
		}
		return 1
	})
	for i, el := range ends {
		if el.end {
			continue
		}
		el.To = all(len(el.From))
		if i+1 < len(ends) {
			el.To = before(ends[i+1].From)
		}
		s.Elements = append(s.Elements, el.Element)
	}
	return s
}

// before is the number before one.
func before(b []byte) []byte {
	b = bytes.Clone(b)
	for i := len(b) - 1; i >= 0; i-- {
		b[i]--
		if b[i] != 0xff {
			break
		}
	}
	return b
}
